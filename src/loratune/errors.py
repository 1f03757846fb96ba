"""The errors that loratune raises on purpose: one root, a branch for each thing a caller may catch.

A message says what was given, what was expected and what to do. Divergence is not here: it is an
outcome of a trial (`records.Outcome`), not an exception.
"""


class LoratuneError(ValueError):
    """The root: the request cannot be carried out as it was made. The command line exits with 2."""


class StudyError(LoratuneError):
    """A study file, or a combination of its values, that cannot be run."""


class DataError(LoratuneError):
    """Rows that are missing, malformed or too few."""


class MissingDataError(DataError):
    """A file of rows that is not on this machine."""


class ModelError(LoratuneError):
    """A base model that is missing, unsafe to load, or has no layer that was asked for."""


class CapacityError(LoratuneError):
    """Something that does not fit into the device's memory or onto the disk."""


class StoreError(LoratuneError):
    """A results folder or database that cannot be used: another study's, newer, or not writable."""


class AnalysisError(LoratuneError):
    """Results that do not allow the conclusion that was asked for."""


class EvaluationError(LoratuneError):
    """A task that is unknown or whose questions cannot be had."""


def one_line(error: Exception, *, most: int | None = None) -> str:
    """What an error says, on one line: its text alone where loratune raised it, else its type too.

    `most`: characters of the text.
    """
    text = " ".join(str(error).split())[:most]
    return text if isinstance(error, LoratuneError) else f"{type(error).__name__}: {text}".strip()

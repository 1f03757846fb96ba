"""What makes two trials the same trial, and what makes them trials of the same cell.

Ids are prefixed hashes of canonical JSON.
"""

import hashlib
import json
from dataclasses import fields
from operator import attrgetter

from loratune.errors import StudyError
from loratune.records import Trial

# Changes when the meaning of a trial's fields changes, so that old and new numbers never mix.
IDENTITY_VERSION = 1


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, floats in their shortest exact form.

    Raises:
        StudyError: the value holds something that JSON cannot state exactly (NaN, an object).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StudyError(f"cannot be stated exactly in JSON: {error}") from error


def content_id(prefix: str, value: object) -> str:
    """`prefix-` and the first 20 hex digits (80 bits) of SHA-256 over the canonical JSON."""
    return f"{prefix}-{hashlib.sha256(canonical_json(value).encode()).hexdigest()[:20]}"


# `rows` is left out as well: N asked for and all rows can be the same rows (same fingerprint).
_WITHIN_CELL = frozenset({"trial_id", "provisional", "learning_rate", "seed", "rows"})
_OF_CELL = attrgetter(*(one.name for one in fields(Trial) if one.name not in _WITHIN_CELL))


def cell_key(trial: Trial) -> tuple[object, ...]:
    """All that the trials of a cell share: everything but LR and seed."""
    return _OF_CELL(trial)

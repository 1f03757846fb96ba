"""Records to canonical JSON and back, exactly.

JSON here is sorted by key, without spaces, in ASCII, with floats as their shortest exact decimal;
a value that JSON cannot hold (NaN, infinity) is an error, not something near it. Numbers that may
be NaN stand in columns of their own (`tables.ExactFloat`), never in JSON.
"""

import json
from dataclasses import asdict, fields
from typing import Any

from loratune.records import (
    BlockSums,
    DataSummary,
    MethodChoice,
    NoiseProbe,
    Provenance,
    QuestionSet,
    Trial,
)

_TRIAL_FIELDS = tuple(field.name for field in fields(Trial))
# One encoder for all: json.dumps with arguments builds a new one each call.
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def trial_to_json(trial: Trial) -> str:
    """The trial as canonical JSON."""
    # Not through `asdict`, which copies deeply and takes far longer; studies have 100,000 trials.
    body: dict[str, Any] = {name: getattr(trial, name) for name in _TRIAL_FIELDS}
    body["method"] = {"name": trial.method.name, "options": trial.method.options}
    return _encode(body)


def trial_from_json(text: str) -> Trial:
    """The trial that `trial_to_json` wrote."""
    body: dict[str, Any] = json.loads(text)
    method: dict[str, Any] = body["method"]
    options = tuple((str(name), value) for name, value in method["options"])
    body["method"] = MethodChoice(name=method["name"], options=options)
    body["targets"] = tuple(body["targets"])
    return Trial(**body)


def provenance_to_json(provenance: Provenance) -> str:
    """The provenance as canonical JSON."""
    return _encode(asdict(provenance))


def provenance_from_json(text: str) -> Provenance:
    """The provenance that `provenance_to_json` wrote."""
    body: dict[str, Any] = json.loads(text)
    body["versions"] = tuple((str(name), str(version)) for name, version in body["versions"])
    return Provenance(**body)


def summary_to_json(summary: DataSummary) -> str:
    """The summary as canonical JSON."""
    return _encode(asdict(summary))


def summary_from_json(text: str) -> DataSummary:
    """The summary that `summary_to_json` wrote."""
    body: dict[str, Any] = json.loads(text)
    body["num_in_test"] = tuple((str(task), int(num)) for task, num in body["num_in_test"])
    body["validation_sources"] = tuple(map(int, body.get("validation_sources", ())))
    return DataSummary(**body)


def probe_to_json(probe: NoiseProbe) -> str:
    """The probe as canonical JSON; its numbers are finite."""
    return _encode(asdict(probe))


def probe_from_json(text: str) -> NoiseProbe:
    """The probe that `probe_to_json` wrote."""
    body: dict[str, Any] = json.loads(text)
    body["blocks"] = tuple(BlockSums(**one) for one in body["blocks"])
    return NoiseProbe(**body)


def questions_to_json(questions: QuestionSet) -> str:
    """The question set as canonical JSON."""
    return _encode(asdict(questions))


def questions_from_json(text: str) -> QuestionSet:
    """The question set that `questions_to_json` wrote."""
    body: dict[str, Any] = json.loads(text)
    body["references"] = tuple(body["references"])
    body["choices"] = tuple(tuple(of_one) for of_one in body["choices"])
    return QuestionSet(**body)

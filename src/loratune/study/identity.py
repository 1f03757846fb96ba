"""Canonical JSON and the prefixed hashes made of it: what makes two trials the same trial."""

import hashlib
import json

from loratune.errors import StudyError

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

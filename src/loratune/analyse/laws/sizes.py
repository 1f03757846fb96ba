"""A model's number of parameters from its name: a guess, marked as one wherever it is used."""

import re

_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([kKmMbB])(?![A-Za-z0-9])")


def parameters_of_name(model: str) -> float | None:
    """135e6 for "SmolLM2-135M-Instruct", 1e6 for "demo:1m"; None where the name has no one size."""
    found = {
        float(number) * _UNITS[unit.lower()]
        for number, unit in _SIZE.findall(model.rstrip("/").rsplit("/", maxsplit=1)[-1])
    }
    return found.pop() if len(found) == 1 else None

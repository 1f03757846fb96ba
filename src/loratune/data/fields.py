"""Find the prompt and the response of a data set by the names of its columns.

For the commands that take `--data` without a study file. It looks at names alone, in every row; a
study file always says what it uses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.errors import DataError

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
)
_CHATS = ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class FieldChoice:
    """The study's `prompt` and `response`, or its `messages`; what is not used is None."""

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None


def detect_fields(rows: Sequence[Mapping[str, Any]]) -> FieldChoice:
    """The fields that every row has and whose names say what they are.

    Alpaca's `input` is added to the instruction where a row has one.

    Raises:
        DataError: no known names, or more than one choice; it lists the columns.
    """
    columns = list(rows[0]) if rows else []
    common = set(columns).intersection(*rows)
    choices = [
        FieldChoice(messages=name)
        for name in _CHATS
        if name in common and all(isinstance(row[name], list) for row in rows)
    ]
    for prompt, response in _PAIRS:
        if prompt in common and response in common:
            if prompt == "instruction" and any(row.get("input") for row in rows):
                prompt = "{instruction}\n\n{input?}"
            choices.append(FieldChoice(prompt=prompt, response=response))
    seen = ", ".join(columns) or "none"
    if not choices:
        raise DataError(
            f"no prompt and response found among the columns {seen}; name them with prompt: and "
            "response:, or a chat's column with messages:"
        )
    if len(choices) > 1:
        names = "; ".join(
            choice.messages or f"{choice.prompt} and {choice.response}" for choice in choices
        )
        raise DataError(
            f"the columns {seen} allow more than one choice ({names!r}); say which with prompt: "
            "and response:, or messages:"
        )
    return choices[0]

"""Which rows are held out, which N train, and when two questions are the same.

All three depend on the rows alone: never on a trial's seed, and the held-out rows neither on N nor
on the order of the rows.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loratune.errors import DataError

# Draws are those of version 1 for good: another text here would be another split.
_HOLD_OUT_DOMAIN = b"loratune hold-out 1\0"
_RANDOM_ROWS_SEED = 0x726F7773  # "rows"; any number would do

_SAME_CHARACTERS = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2010": "-",
        "\u2011": "-",
        "\u2012": "-",
        "\u2013": "-",
        "\u2014": "-",
        "\u2212": "-",
    }
)
# Not the point before a digit, nor what arithmetic needs (+ - * / % =): ".5" and "3 * 4" stay.
_OPENING = "\"'([{<,;:!?`"
_CLOSING = "\"')]}>,;:!?`."


def normalise(question: str) -> str:
    """The form in which two questions are compared.

    Unicode NFKC, case folded, white space collapsed, curly quotes and long dashes made plain, and
    quotes, brackets and sentence punctuation taken off both ends of every word. Signs that can
    change the meaning of arithmetic stay.
    """
    plain = unicodedata.normalize("NFKC", question).casefold().translate(_SAME_CHARACTERS)
    words = (word.rstrip(_CLOSING).lstrip(_OPENING) for word in plain.split())
    return " ".join(word for word in words if word)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Positions of the rows on either side, ascending, and how many groups were held out."""

    remaining: NDArray[np.int64]
    held_out: NDArray[np.int64]
    num_groups: int


def hold_out(groups: Sequence[str], *, num_rows: int) -> Split:
    """Hold out whole groups of exactly `num_rows` rows together.

    Groups are taken in the order of a hash of their keys; one that no longer fits is passed over.

    Args:
        groups: each row's group key.
        num_rows: rows to hold out.

    Raises:
        DataError: fewer rows than that, or no training row would remain, or the groups' sizes do
            not add up to it.
    """
    if num_rows >= len(groups):
        raise DataError(
            f"validation.rows={num_rows} leaves no training row: {len(groups)} rows are left "
            f"after dropping those too long; choose at most {max(len(groups) - 1, 0)}"
        )
    members: dict[str, list[int]] = {}
    for row, key in enumerate(groups):
        members.setdefault(key, []).append(row)
    held: list[int] = []
    num_groups = 0
    for key in sorted(members, key=_group_hash):
        if len(held) + len(members[key]) <= num_rows:
            held += members[key]
            num_groups += 1
            if len(held) == num_rows:
                break
    if len(held) != num_rows:
        largest = max(map(len, members.values()))
        raise DataError(
            f"validation.rows={num_rows} cannot be made of whole groups: {len(members)} groups of "
            f"up to {largest} rows come to {len(held)}; choose {len(held) or largest}, or another "
            "group_by"
        )
    is_held = np.zeros(len(groups), dtype=np.bool_)
    is_held[held] = True
    return Split(np.flatnonzero(~is_held), np.flatnonzero(is_held), num_groups)


def _group_hash(key: str) -> bytes:
    return hashlib.sha256(_HOLD_OUT_DOMAIN + key.encode("utf-8", "surrogatepass")).digest()


def choose_rows(
    num_remaining: int, *, rows: int | None, order: Literal["first", "random"]
) -> NDArray[np.int64]:
    """Positions of the N training rows among those that remain after the hold-out, ascending.

    A smaller N is a part of a larger one, in both orders, and `rows=None` is all of them.

    Raises:
        DataError: N is more than what remains.
    """
    if rows is None:
        return np.arange(num_remaining, dtype=np.int64)
    if rows > num_remaining:
        raise DataError(
            f"rows={rows} is more than there are: {num_remaining} rows remain after dropping those "
            f"too long and the hold-out; choose at most {num_remaining}"
        )
    if order == "first":
        return np.arange(rows, dtype=np.int64)
    # Raw words of a bit generator never change between numpy's versions (see `order`).
    words = np.random.PCG64(np.random.SeedSequence(_RANDOM_ROWS_SEED)).random_raw(num_remaining)
    return np.sort(np.argsort(words, kind="stable")[:rows]).astype(np.int64, copy=False)

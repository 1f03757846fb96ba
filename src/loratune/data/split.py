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

    Groups are taken in the order of a hash of their keys; one that does not fit is passed over.

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
    keys = sorted(members, key=_group_hash)
    sizes = [len(members[key]) for key in keys]
    taken = _take(sizes, num_rows)
    if taken is None:
        possible = [size for size in range(1, num_rows) if _take(sizes, size) is not None]
        remedy = f"choose {possible[-1]}" if possible else "choose more"
        raise DataError(
            f"validation.rows={num_rows} cannot be made of whole groups ({len(keys)} groups of "
            f"{min(sizes)} to {max(sizes)} rows); {remedy}, or another validation.group_by"
        )
    is_held = np.zeros(len(groups), dtype=np.bool_)
    for group in taken:
        is_held[members[keys[group]]] = True
    return Split(np.flatnonzero(~is_held), np.flatnonzero(is_held), len(taken))


def _take(sizes: Sequence[int], total: int) -> list[int] | None:
    """Positions of sizes that come to exactly `total`, the earliest first; None: there are none.

    Taking what fits is enough wherever there are small groups. Where it is not, a group is taken if
    the groups behind it can still make up the rest: bit k of `behind[i]` says that some of the
    groups from i on come to k.
    """
    taken: list[int] = []
    left = total
    for position, size in enumerate(sizes):
        if size <= left:
            taken.append(position)
            left -= size
    if left == 0:
        return taken
    mask = (1 << (total + 1)) - 1
    behind = [1]
    for size in reversed(sizes):
        behind.append((behind[-1] | behind[-1] << min(size, total + 1)) & mask)
    behind.reverse()
    if not behind[0] >> total & 1:
        return None
    taken, left = [], total
    for position, size in enumerate(sizes):
        if size <= left and behind[position + 1] >> (left - size) & 1:
            taken.append(position)
            left -= size
    return taken


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

"""Rows of many trials laid end to end as the token arrays of one step. numpy alone.

Legend: M tokens of the step, filler included; B rows, filler included; L tokens with loss.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loratune.data.rows import EncodedRows


@dataclass(frozen=True, eq=False)
class StepRows:
    """The rows of one step, slot by slot: `slots[i]` owns row i of `rows`, in ascending order.

    `weights` multiply each row's token losses. `keys` is a number for each row, of its trial's seed
    and its place in the trial's stream, from which dropout is drawn. `fresh` are the slots whose
    gradient begins with this step.
    """

    rows: EncodedRows
    slots: NDArray[np.int64]
    weights: NDArray[np.float64]
    keys: NDArray[np.int64]
    fresh: frozenset[int]


@dataclass(frozen=True, eq=False)
class LaidOut:
    """A step as arrays.

    `counts` are the tokens of each slot without filler. `row_bounds` int32[B + 1] bound every row,
    those of filler included. Token `index[l]` predicts `labels[l]`, in slot `slots[l]`, and its
    loss counts `weights[l]` times. `token_keys` int32[M] are what dropout is drawn from.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    counts: list[int]
    row_bounds: NDArray[np.int32]
    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    slots: NDArray[np.int64]
    weights: NDArray[np.float32]
    token_keys: NDArray[np.int32]


def lay_out_step(
    step: StepRows,
    *,
    num_slots: int,
    longest_row: int,
    num_tokens: int | None = None,
    num_rows: int | None = None,
) -> LaidOut:
    """Lay the rows of a step end to end.

    Args:
        step: the rows.
        num_slots: slots of the pack.
        longest_row: no row is longer; filler is cut into rows of at most this length.
        num_tokens: M; None: as many as there are.
        num_rows: B, with empty rows at the end; None: as many as there are.
    """
    lengths = step.rows.lengths
    counts = np.bincount(step.slots, weights=lengths, minlength=num_slots).astype(np.int64)
    real = int(lengths.sum())
    total = real if num_tokens is None else num_tokens
    assert real <= total, (real, total)

    starts = step.rows.offsets[:-1]
    within = np.arange(real) - np.repeat(starts, lengths)
    input_ids = np.zeros(total, dtype=np.int64)
    input_ids[:real] = step.rows.input_ids
    position_ids = np.zeros(total, dtype=np.int64)
    position_ids[:real] = within
    position_ids[real:] = np.arange(total - real) % longest_row
    token_keys = np.zeros(total, dtype=np.int32)
    token_keys[:real] = _mixed(np.repeat(step.keys, lengths), within)

    # A row's first token is predicted from nothing.
    has_loss = step.rows.is_target & (within > 0)
    bounds = np.concatenate([starts, np.arange(real, total, longest_row)])
    missing = 0 if num_rows is None else num_rows - len(bounds)
    assert missing >= 0, (num_rows, len(bounds))
    return LaidOut(
        input_ids=input_ids,
        position_ids=position_ids,
        counts=[int(count) for count in counts],
        row_bounds=np.concatenate([bounds, np.full(missing + 1, total)]).astype(np.int32),
        index=np.flatnonzero(has_loss) - 1,
        labels=input_ids[:real][has_loss],
        slots=np.repeat(step.slots, lengths)[has_loss],
        weights=np.repeat(step.weights, lengths)[has_loss].astype(np.float32),
        token_keys=token_keys,
    )


def _mixed(keys: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """One 32-bit number of a row's key and a position in it (Steele and others' splitmix64)."""
    word = keys.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word >> np.uint64(32)).astype(np.uint32).view(np.int32)


def most_filler_rows(*, num_tokens: int, longest_row: int) -> int:
    """The most rows of filler that a step of M tokens can have."""
    return num_tokens // longest_row + 1

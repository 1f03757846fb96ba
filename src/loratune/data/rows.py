"""Token rows laid end to end, and how some of them become one padded batch. numpy alone.

A row is one training example after templating and tokenisation: its token ids, and for each token
whether it carries loss *as a label* (the model predicts it from the tokens before it). Nothing here
knows text, tokenizers, splits or the order of training.

Shapes: M all tokens laid end to end, B rows of a batch, T tokens of the longest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRows:
    """Rows of tokens: row i is `input_ids[offsets[i] : offsets[i + 1]]`.

    `input_ids` is int32[M], `offsets` int64[num_rows + 1] and begins with 0, `is_target` bool[M].
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    is_target: NDArray[np.bool_]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64[num_rows]."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids and loss mask of one row, both of length T."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows")
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self.input_ids[begin:end], self.is_target[begin:end]

    def take(self, indices: ArrayLike) -> "EncodedRows":
        """The rows at `indices`, in that order; an index may come more than once."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = _offsets(lengths)
        # Token k of the result lies (k - offsets[i]) tokens into its source row.
        within = np.arange(int(offsets[-1]), dtype=np.int64) - np.repeat(offsets[:-1], lengths)
        source = np.repeat(self.offsets[:-1][chosen], lengths) + within
        return EncodedRows(self.input_ids[source], offsets, self.is_target[source])


class PaddedRows(NamedTuple):
    """One batch, padded on the right: int64 `input_ids[B, T]` and `attention_mask[B, T]` (1 where
    a token is, 0 where padding is), bool `is_target[B, T]` (False on padding).
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    is_target: NDArray[np.bool_]


def lay_end_to_end(
    ids: Sequence[Sequence[int]], is_target: Sequence[Sequence[bool]]
) -> EncodedRows:
    """Rows given one by one as `EncodedRows`."""
    return EncodedRows(
        np.fromiter(chain.from_iterable(ids), dtype=np.int32),
        _offsets(np.array([len(row) for row in ids], dtype=np.int64)),
        np.fromiter(chain.from_iterable(is_target), dtype=np.bool_),
    )


def concatenate(parts: Sequence[EncodedRows]) -> EncodedRows:
    """The rows of all parts, one part after the other."""
    if not parts:
        return lay_end_to_end([], [])
    return EncodedRows(
        np.concatenate([part.input_ids for part in parts]),
        _offsets(np.concatenate([part.lengths for part in parts])),
        np.concatenate([part.is_target for part in parts]),
    )


def pad_rows(rows: EncodedRows, indices: ArrayLike, *, pad_id: int) -> PaddedRows:
    """The rows at `indices` as one batch, padded on the right to the longest of them."""
    chosen = np.asarray(indices, dtype=np.int64)
    taken = rows.take(chosen)
    lengths = taken.lengths
    num_columns = int(lengths.max(initial=0))
    is_token = np.arange(num_columns)[None, :] < lengths[:, None]
    input_ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    is_target = np.zeros(is_token.shape, dtype=np.bool_)
    # Boolean indexing walks row by row, which is the order in which the tokens lie.
    input_ids[is_token] = taken.input_ids
    is_target[is_token] = taken.is_target
    return PaddedRows(input_ids, is_token.astype(np.int64), is_target)


def cut_microbatches(lengths: ArrayLike, *, tokens_per_microbatch: int) -> list[NDArray[np.int64]]:
    """Cut the rows of one batch into micro-batches of rows of like length.

    The rows are sorted by length, longest first so that a lack of memory shows at once, and cut so
    that rows x longest <= `tokens_per_microbatch`, padding included; a row that is longer than that
    stands alone. The arrays hold positions in `lengths`, each position exactly once.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch={tokens_per_microbatch}; give at least 1")
    sizes = np.asarray(lengths, dtype=np.int64)
    by_length = np.argsort(-sizes, kind="stable")
    cuts: list[NDArray[np.int64]] = []
    begin = 0
    while begin < len(by_length):
        longest = max(int(sizes[by_length[begin]]), 1)
        end = begin + max(tokens_per_microbatch // longest, 1)
        cuts.append(by_length[begin:end])
        begin = end
    return cuts


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])

"""Which token of a step belongs to which adapter: rows of many trials laid end to end.

The tokens of one slot lie together, slot after slot, without padding. Kernels work on tiles of at
most `TILE` tokens of one slot each.

The tensors keep their addresses from step to step and are written in place, so that nothing that
was compiled or captured with them is made anew. Filler tokens belong to no slot.

Legend: A slots, M tokens of a step, T tiles, C chunks (runs of tiles that one kernel sums over).
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loratune.planning.packing import TOKENS_SUMMED_AT_ONCE

TILE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """int32 tensors: tile t holds tokens [tile_begin_T[t], tile_end_T[t]) of slot `tile_slot_T[t]`.

    A tile of slot -1 holds filler: its tokens get nothing from any adapter. Slot a has the tokens
    [slot_bounds_A[a], slot_bounds_A[a + 1]). Chunks bound a slot's
    tokens likewise, filler left out; slot a has chunks [slot_chunk_A[a], slot_chunk_A[a + 1]).
    `is_fresh_A` is 1 where a slot's gradient begins with this step. `token_slot_M` is a
    token's slot.
    """

    tile_slot_T: Tensor
    tile_begin_T: Tensor
    tile_end_T: Tensor
    slot_bounds_A: Tensor
    chunk_slot_C: Tensor
    chunk_begin_C: Tensor
    chunk_end_C: Tensor
    slot_chunk_A: Tensor
    is_fresh_A: Tensor
    token_slot_M: Tensor

    @classmethod
    def of(cls, whole: Tensor, lengths: Sequence[int]) -> "Routing":
        """Views of what `route` gave, sent to a device in one piece."""
        parts = cast("tuple[Tensor, ...]", whole.split(list(lengths)))  # torch leaves it untyped
        return cls(*parts)

    def tensors(self) -> list[Tensor]:
        """The fields in order: what `Routing(*tensors)` takes."""
        return [getattr(self, one.name) for one in fields(self)]


def num_tiles(*, num_tokens: int, num_slots: int) -> int:
    """The most tiles that any step of `num_tokens` over `num_slots` slots can have."""
    return num_tokens // TILE + num_slots + 1


def num_chunks(*, num_tokens: int, num_slots: int) -> int:
    """The most chunks that any step can have."""
    return num_tokens // TOKENS_SUMMED_AT_ONCE + num_slots


def route(
    counts: Sequence[int],
    *,
    fresh: Sequence[bool],
    num_tokens: int,
    fixed_size: bool,
) -> tuple[NDArray[np.int32], list[int]]:
    """The routing of a step in which slot a has `counts[a]` tokens, slot after slot.

    Args:
        counts: tokens of each slot.
        fresh: whether a slot's gradient begins with this step.
        num_tokens: M, the tokens of the step, filler included.
        fixed_size: make tensors of the sizes that any step of M tokens needs, with empty tiles
            and chunks at their ends.

    Returns:
        The fields of a `Routing` end to end, and the length of each; see `Routing.of`.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    assert begins[-1] <= num_tokens, (begins[-1], num_tokens)
    # What is left over is a slot of its own, -1, behind all others.
    spans = [(slot, int(begins[slot]), int(sizes[slot])) for slot in range(len(sizes))]
    tiles = _cut([*spans, (-1, int(begins[-1]), num_tokens - int(begins[-1]))], TILE)
    chunks = _cut(spans, TOKENS_SUMMED_AT_ONCE)
    firsts = np.searchsorted(np.array([slot for slot, _, _ in chunks]), np.arange(len(sizes) + 1))
    if fixed_size:
        tiles += [(-1, 0, 0)] * (
            num_tiles(num_tokens=num_tokens, num_slots=len(sizes)) - len(tiles)
        )
        chunks += [(-1, 0, 0)] * (
            num_chunks(num_tokens=num_tokens, num_slots=len(sizes)) - len(chunks)
        )
    token_slot = np.full(num_tokens, -1, dtype=np.int32)
    for slot, begin, count in spans:
        token_slot[begin : begin + count] = slot
    begun = np.asarray(fresh, dtype=np.int32) * (sizes > 0)
    parts: list[NDArray[np.int32]] = [
        *np.array(tiles, dtype=np.int32).reshape(-1, 3).T,
        begins.astype(np.int32),
        *np.array(chunks, dtype=np.int32).reshape(-1, 3).T,
        firsts.astype(np.int32),
        begun.astype(np.int32),
        token_slot,
    ]
    return np.concatenate(parts), [len(part) for part in parts]


def _cut(spans: Sequence[tuple[int, int, int]], size: int) -> list[tuple[int, int, int]]:
    """(slot, begin, count) spans as (slot, begin, end) pieces of at most `size` tokens."""
    return [
        (slot, begin, min(begin + size, first + count))
        for slot, first, count in spans
        for begin in range(first, first + count, size)
    ]

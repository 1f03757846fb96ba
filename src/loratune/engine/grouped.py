"""Low-rank products of many adapters at once: every token goes through its own adapter's factors.

Three products are all that an adapter's forward and backward consist of:

    shrink  H = X W'         each token's vector onto its adapter's K directions
    expand  Y = H W          and back
    outer   G (+)= H' X      summed over an adapter's tokens: a gradient

N may be several matrices side by side (query, key, value): `segments` are their bounds, 0 first and
N last. H then has K columns for each of them, one block after the other, and block i meets segment
i alone. With one segment these are plain products.

Two implementations: batched products over equal tiles, for any device, and Triton kernels over
ragged tiles for CUDA (`engine.kernels`). Sums are in float32; operands are in the base's precision.
What belongs to no slot is zero.

Legend: A slots, M tokens, K directions, N features, S segments, T tiles, I tokens of a tile.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from loratune.engine.routing import TILE_CPU, Routing


class GroupedProducts(Protocol):
    """The three products, by whatever means a device has.

    Factors come as a list of one or two: the second is a frozen correction beside the trained pair.
    """

    def shrink(
        self, x_MN: Tensor, ws_AKN: Sequence[Tensor], routing: Routing, segments: Sequence[int]
    ) -> list[Tensor]:
        """For each W its H = X W', K columns a segment, in the precision of x."""
        ...

    def expand(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        segments: Sequence[int],
        *,
        bias_N: Tensor | None = None,
    ) -> Tensor:
        """Y_MN, the sum of every H W and the bias, in the precision of h."""
        ...

    def outer(
        self,
        hs_MK: Sequence[Tensor],
        x_MN: Tensor,
        routing: Routing,
        segments: Sequence[int],
        *,
        into_AKN: Tensor,
        scale_A: Tensor | None,
    ) -> None:
        """G = scale (the sum of all H)' X over each slot's tokens, into float32 `into_AKN`.

        A slot without tokens keeps what it has; a fresh one is overwritten, any other added to.
        """
        ...


class TiledProducts:
    """Batched products over tiles of equal size, each of one slot: any device, any precision."""

    def shrink(
        self, x_MN: Tensor, ws_AKN: Sequence[Tensor], routing: Routing, segments: Sequence[int]
    ) -> list[Tensor]:
        """See `GroupedProducts`."""
        x_TIN = _tiles(x_MN)
        hs = list[Tensor]()
        for w_AKN in ws_AKN:
            w_TKN = _of_tiles(w_AKN, routing, count=len(x_TIN))
            parts = [
                torch.bmm(x_TIN[:, :, low:high], w_TKN[:, :, low:high].transpose(1, 2))
                for low, high in pairwise(segments)
            ]
            hs.append(_side_by_side(parts).flatten(0, 1))
        return hs

    def expand(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        segments: Sequence[int],
        *,
        bias_N: Tensor | None = None,
    ) -> Tensor:
        """See `GroupedProducts`."""
        total: Tensor | None = None
        for h_MK, w_AKN in zip(hs_MK, ws_AKN, strict=True):
            h_TIK = _tiles(h_MK)
            w_TKN = _of_tiles(w_AKN, routing, count=len(h_TIK))
            rank = w_AKN.shape[1]
            parts = [
                torch.bmm(h_TIK[:, :, i * rank : (i + 1) * rank], w_TKN[:, :, low:high])
                for i, (low, high) in enumerate(pairwise(segments))
            ]
            y_TIN = _side_by_side(parts)
            total = y_TIN if total is None else total + y_TIN
        assert total is not None
        y_MN = total.flatten(0, 1)
        return y_MN if bias_N is None else y_MN.add_(bias_N)

    def outer(
        self,
        hs_MK: Sequence[Tensor],
        x_MN: Tensor,
        routing: Routing,
        segments: Sequence[int],
        *,
        into_AKN: Tensor,
        scale_A: Tensor | None,
    ) -> None:
        """See `GroupedProducts`."""
        h_MK = hs_MK[0] if len(hs_MK) == 1 else hs_MK[0] + hs_MK[1]
        h_TIK, x_TIN = _tiles(h_MK), _tiles(x_MN)
        into_AKN.masked_fill_(routing.is_fresh_A.view(-1, 1, 1) != 0, 0)
        # What filler gives is dropped here, not multiplied by zero: it may be NaN.
        slots_T = routing.tile_slot_T[: len(x_TIN)]
        real_T = slots_T >= 0
        slots = slots_T[real_T].long()
        rank = into_AKN.shape[1]
        for i, (low, high) in enumerate(pairwise(segments)):
            h_of_segment = h_TIK[:, :, i * rank : (i + 1) * rank]
            g_TKN = torch.bmm(h_of_segment.transpose(1, 2), x_TIN[:, :, low:high])[real_T]
            if scale_A is not None:
                g_TKN = g_TKN * scale_A[slots, None, None]
            into_AKN[:, :, low:high].index_add_(0, slots, g_TKN.to(into_AKN.dtype))


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _tiles(x_MN: Tensor) -> Tensor:
    return x_MN.view(-1, TILE_CPU, x_MN.shape[1])


def _of_tiles(w_AKN: Tensor, routing: Routing, *, count: int) -> Tensor:
    """The own slot's factors of each of the `count` tiles that hold tokens; zeros for filler."""
    slots_T = routing.tile_slot_T[:count].long()
    picked_TKN = w_AKN.index_select(0, slots_T.clamp(min=0))
    return torch.where((slots_T >= 0)[:, None, None], picked_TKN, 0)

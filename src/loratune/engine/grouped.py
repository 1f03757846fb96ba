"""Low-rank products of many adapters at once: every token goes through its own adapter's factors.

Three products are all that an adapter's forward and backward consist of:

    shrink  H = X W'         each token's vector onto its adapter's K directions
    expand  Y = H W          and back
    outer   G (+)= H' X      summed over an adapter's tokens: a gradient

Two implementations: batched products over equal tiles, for any device, and Triton kernels over
ragged tiles for CUDA (`engine.kernels`). Sums are in float32; operands are in the base's precision.
What belongs to no slot is zero. All operands may be parts of wider matrices, as long as a row's
numbers lie side by side.

Legend: A slots, M tokens, K directions, N features, T tiles, I tokens of a tile.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loratune.engine.routing import TILE_CPU, Routing


class GroupedProducts(Protocol):
    """The three products, by whatever means a device has.

    Factors come as a list of one or two: the second is a frozen correction beside the trained pair.
    """

    def shrink(
        self,
        x_MN: Tensor,
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        into: Sequence[Tensor],
    ) -> None:
        """For each W its H = X W', M x K, in the precision of x."""
        ...

    def expand(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        into_MN: Tensor,
        bias_N: Tensor | None = None,
    ) -> None:
        """Y, the sum of every H W and the bias, in the precision of h."""
        ...

    def outer(
        self,
        hs_MK: Sequence[Tensor],
        x_MN: Tensor,
        routing: Routing,
        *,
        into_AKN: Tensor,
        scale_A: Tensor | None = None,
    ) -> None:
        """G = scale (the sum of all H)' X over each slot's tokens, in float32.

        A slot without tokens keeps what it has; a fresh one is overwritten, any other added to.
        """
        ...


class TiledProducts:
    """Batched products over tiles of equal size, each of one slot: any device, any precision."""

    def shrink(
        self,
        x_MN: Tensor,
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        into: Sequence[Tensor],
    ) -> None:
        """See `GroupedProducts`."""
        x_TIN = _tiles(x_MN)
        for w_AKN, h_MK in zip(ws_AKN, into, strict=True):
            w_TKN = _of_tiles(w_AKN, routing, count=len(x_TIN))
            h_MK.copy_(torch.bmm(x_TIN, w_TKN.transpose(1, 2)).flatten(0, 1))

    def expand(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        into_MN: Tensor,
        bias_N: Tensor | None = None,
    ) -> None:
        """See `GroupedProducts`."""
        for index, (h_MK, w_AKN) in enumerate(zip(hs_MK, ws_AKN, strict=True)):
            h_TIK = _tiles(h_MK)
            w_TKN = _of_tiles(w_AKN, routing, count=len(h_TIK))
            y_MN = torch.bmm(h_TIK, w_TKN).flatten(0, 1)
            into_MN.copy_(y_MN) if index == 0 else into_MN.add_(y_MN)
        if bias_N is not None:
            into_MN.add_(bias_N)

    def outer(
        self,
        hs_MK: Sequence[Tensor],
        x_MN: Tensor,
        routing: Routing,
        *,
        into_AKN: Tensor,
        scale_A: Tensor | None = None,
    ) -> None:
        """See `GroupedProducts`."""
        h_MK = hs_MK[0] if len(hs_MK) == 1 else hs_MK[0] + hs_MK[1]
        h_TIK, x_TIN = _tiles(h_MK), _tiles(x_MN)
        into_AKN.masked_fill_(routing.is_fresh_A.view(-1, 1, 1) != 0, 0)
        # What filler gives is dropped here, not multiplied by zero: it may be NaN.
        slots_T = routing.tile_slot_T[: len(x_TIN)]
        real_T = slots_T >= 0
        slots = slots_T[real_T].long()
        g_TKN = torch.bmm(h_TIK.transpose(1, 2), x_TIN)[real_T].to(into_AKN.dtype)
        if scale_A is not None:
            g_TKN *= scale_A[slots, None, None]
        into_AKN.index_add_(0, slots, g_TKN)


def _tiles(x_MN: Tensor) -> Tensor:
    return x_MN.unflatten(0, (-1, TILE_CPU))


def _of_tiles(w_AKN: Tensor, routing: Routing, *, count: int) -> Tensor:
    """The own slot's factors of each of the `count` tiles that hold tokens; zeros for filler."""
    slots_T = routing.tile_slot_T[:count].long()
    picked_TKN = w_AKN.index_select(0, slots_T.clamp(min=0))
    return torch.where((slots_T >= 0)[:, None, None], picked_TKN, 0)

"""Low-rank products of many adapters at once: every token goes through its own adapter's factors.

Three products are all that an adapter's forward and backward consist of:

    shrink  H = X W'         each token's vector onto its adapter's K directions
    expand  Y = H W          and back
    outer   G (+)= H' X      summed over an adapter's tokens: a gradient

Two implementations: one product a slot, for any device, and Triton kernels over tiles for CUDA
(`engine.kernels`). Sums are in float32; operands are in the base's precision.
What belongs to no slot is zero. All operands may be parts of wider matrices, as long as a row's
numbers lie side by side.

Legend: A slots, M tokens, K directions, N features.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from loratune.engine.routing import Routing


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


class LoopedProducts:
    """One product after another, slot by slot: any device, any precision.

    By one thread: the products are so small that two threads wait for each other longer than they
    work (24 slots of 170 tokens, 128 x 8, on 2 cores: 2.3 ms by two threads, 0.3 ms by one).
    """

    def shrink(
        self,
        x_MN: Tensor,
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        into: Sequence[Tensor],
    ) -> None:
        """See `GroupedProducts`."""
        with _one_thread(x_MN.device):
            for w_AKN, h_MK in zip(ws_AKN, into, strict=True):
                for slot, tokens in _slots(routing):
                    h_MK[tokens] = x_MN[tokens] @ w_AKN[slot].T
                h_MK[_filler(routing)] = 0

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
        with _one_thread(into_MN.device):
            for slot, tokens in _slots(routing):
                y_MN = hs_MK[0][tokens] @ ws_AKN[0][slot]
                for h_MK, w_AKN in zip(hs_MK[1:], ws_AKN[1:], strict=True):
                    y_MN.addmm_(h_MK[tokens], w_AKN[slot])
                into_MN[tokens] = y_MN
            into_MN[_filler(routing)] = 0
        if bias_N is not None:
            into_MN += bias_N

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
        fresh: list[int] = routing.is_fresh_A.tolist()
        scales = [1.0] * len(fresh) if scale_A is None else scale_A.tolist()
        with _one_thread(x_MN.device):
            for slot, tokens in _slots(routing):
                h_MK = hs_MK[0][tokens].float()
                if len(hs_MK) == 2:
                    h_MK = h_MK + hs_MK[1][tokens]
                into_AKN[slot].addmm_(
                    h_MK.T, x_MN[tokens].float(), beta=0 if fresh[slot] else 1, alpha=scales[slot]
                )


def _slots(routing: Routing) -> list[tuple[int, slice]]:
    """Each slot that has tokens, and where they lie."""
    bounds: list[int] = routing.slot_bounds_A.tolist()
    return [
        (slot, slice(low, high)) for slot, (low, high) in enumerate(pairwise(bounds)) if low < high
    ]


def _filler(routing: Routing) -> slice:
    """The tokens behind the last slot's."""
    return slice(int(routing.slot_bounds_A[-1]), None)


@contextmanager
def _one_thread(device: torch.device) -> Generator[None]:
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

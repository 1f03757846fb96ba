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
        segments: Sequence[int] | None = None,
    ) -> None:
        """Y, the sum of every H W and the bias, in the precision of h.

        With `segments`, bounds of at most three members in N, each member has K columns of H of its
        own, side by side, and W holds the members' parts side by side too.
        """
        ...

    def expand_rescaled(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        onto_MN: Tensor,
        gain_AN: Tensor,
        bias_N: Tensor | None,
        kept_MN: Tensor | None,
        segments: Sequence[int],
    ) -> None:
        """Y = gain (Y + the sum of every H W) + bias, in place; filler's gain is one.

        What is rescaled is written to `kept_MN`, where that is given.
        """
        ...

    def rescale_gradient(
        self,
        grads: Sequence[Tensor],
        y_MN: Tensor,
        routing: Routing,
        *,
        gain_AN: Tensor,
        inverse_norm_AN: Tensor,
        is_scaled: bool,
        into_MN: Tensor,
        into_AN: Tensor,
    ) -> None:
        """The backward of `expand_rescaled`: dY gain, and the gradient of gain times norm.

        The latter is the sum over a slot's tokens of dY times what was rescaled, over the norm, in
        float32; overwritten or added to as by `outer`. What was rescaled is y, or y over the gain
        if `is_scaled`: then a gain of exactly zero hides it, and its gradient is zero. A slot whose
        inverse norms are zero trains no magnitudes; its gradient is zero.

        `grads` are the members' parts of dY, in order.
        """
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
        segments: Sequence[int] | None = None,
    ) -> None:
        """See `GroupedProducts`."""
        with _one_thread(into_MN.device):
            for ranks, outputs in members(ws_AKN[0], segments):
                for slot, tokens in _slots(routing):
                    y_MN = hs_MK[0][tokens, ranks] @ ws_AKN[0][slot][:, outputs]
                    for h_MK, w_AKN in zip(hs_MK[1:], ws_AKN[1:], strict=True):
                        y_MN.addmm_(h_MK[tokens, ranks], w_AKN[slot][:, outputs])
                    into_MN[tokens, outputs] = y_MN
            into_MN[_filler(routing)] = 0
        if bias_N is not None:
            into_MN += bias_N

    def expand_rescaled(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        onto_MN: Tensor,
        gain_AN: Tensor,
        bias_N: Tensor | None,
        kept_MN: Tensor | None,
        segments: Sequence[int],
    ) -> None:
        """See `GroupedProducts`."""
        with _one_thread(onto_MN.device):
            for ranks, outputs in members(ws_AKN[0], segments):
                for slot, tokens in _slots(routing):
                    y_MN = onto_MN[tokens, outputs]
                    for h_MK, w_AKN in zip(hs_MK, ws_AKN, strict=True):
                        y_MN.addmm_(h_MK[tokens, ranks], w_AKN[slot][:, outputs])
        if kept_MN is not None:
            kept_MN.copy_(onto_MN)
        for slot, tokens in _slots(routing):
            onto_MN[tokens] *= gain_AN[slot]
        if bias_N is not None:
            onto_MN += bias_N

    def rescale_gradient(
        self,
        grads: Sequence[Tensor],
        y_MN: Tensor,
        routing: Routing,
        *,
        gain_AN: Tensor,
        inverse_norm_AN: Tensor,
        is_scaled: bool,
        into_MN: Tensor,
        into_AN: Tensor,
    ) -> None:
        """See `GroupedProducts`."""
        torch.cat(list(grads), dim=1, out=into_MN)
        fresh: list[int] = routing.is_fresh_A.tolist()
        for slot, tokens in _slots(routing):
            gain_N, inverse_N = gain_AN[slot], inverse_norm_AN[slot]
            sum_N = (into_MN[tokens].float() * y_MN[tokens]).sum(dim=0)
            if is_scaled:
                sum_N = torch.where(gain_N != 0, sum_N / gain_N, 0)
            gradient_N = torch.where(inverse_N != 0, sum_N * inverse_N, 0)
            into_AN[slot] = gradient_N if fresh[slot] else into_AN[slot] + gradient_N
            into_MN[tokens] *= gain_N

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


def members(w_AKN: Tensor, segments: Sequence[int] | None) -> list[tuple[slice, slice]]:
    """Each member's columns of H, and its outputs; one member of all outputs without `segments`."""
    rank = w_AKN.shape[1]
    return [
        (slice(index * rank, (index + 1) * rank), slice(low, high))
        for index, (low, high) in enumerate(pairwise(segments or [0, w_AKN.shape[2]]))
    ]


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

"""DoRA's factors m / |W + scale B A| of the slots that train magnitudes, worked out once an update.

The norms are constants in the gradient and change with A and B alone, that is with an update: a
step whose batch is not complete uses what the last one left.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loratune.engine.slots import Slots, views
from loratune.methods.dora import row_norms

if TYPE_CHECKING:
    from loratune.engine.dora_kernels import GainKernel


class DoraGains:
    """Keeps `gain_AE` and `inverse_norm_AE` of slots up to date."""

    def __init__(self, slots: Slots, weights: Mapping[str, Tensor]) -> None:
        """`weights` are the target layers' own, E x D, by full name; they must stay in place."""
        self._slots = slots
        self._weights = weights
        self._square_norms = {
            name: weight.float().square().sum(dim=1) for name, weight in weights.items()
        }
        self._kernel = _kernel(slots, weights, self._square_norms)

    @torch.no_grad()
    def refresh(self, which: Sequence[int]) -> None:
        """Work out the factors of these slots from their parameters."""
        slots = self._slots
        assert slots.gain_AE is not None
        assert slots.inverse_norm_AE is not None
        if not which:
            return
        if self._kernel is not None:
            self._kernel.refresh(which)
            return
        index_U = torch.tensor(which, device=slots.params_AP.device)
        params_UP, scale_U = slots.params_AP[index_U], slots.scale_A[index_U]
        for group, shape in enumerate(slots.layout.groups):
            part = views(params_UP, slots.layout, group)
            assert part.magnitude_AE is not None
            first = slots.layout.m_offsets[group] - slots.layout.ends[1]
            for member, name in enumerate(shape.names):
                low, high = shape.segments[member : member + 2]
                ranks = slice(member * slots.layout.rank, (member + 1) * slots.layout.rank)
                norm_UE = row_norms(
                    self._weights[name],
                    part.down_AKD[:, ranks],
                    part.up_ARE[:, :, low:high].transpose(1, 2),
                    scale_U,
                    self._square_norms[name],
                )
                outputs = slice(first + low, first + high)
                slots.inverse_norm_AE[index_U, outputs] = 1 / norm_UE
                slots.gain_AE[index_U, outputs] = part.magnitude_AE[:, low:high] / norm_UE


def _kernel(
    slots: Slots, weights: Mapping[str, Tensor], square_norms: Mapping[str, Tensor]
) -> "GainKernel | None":
    """None off CUDA, and for ranks beyond what it can hold."""
    if slots.params_AP.device.type != "cuda":
        return None
    from loratune.engine.dora_kernels import MOST_RANK, GainKernel  # Triton is there with CUDA.

    return GainKernel(slots, weights, square_norms) if slots.layout.rank <= MOST_RANK else None

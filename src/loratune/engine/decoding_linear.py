"""Linear layers of the frozen base under a bank of finished adapters, forward alone.

    y = bias + gain * (W x + up (down x))

as in `engine.packed_linear`, whose operator computes it wherever Triton is not. On CUDA a step has
few rows of each adapter, and kernels of its own (`engine.decoding_kernels`).

Legend: A seats, M tokens, D in, E out (all members of a group), R rank, K = members x R.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from loratune.engine.packed_linear import StepRouting, of_tokens, packed_linear
from loratune.engine.routing import Routing


@final
class DecodingGroup(nn.Module):
    """Linear layers that read one input, under one bank of adapters. Called by its first member.

    `weight_ED` is the members' weights side by side. All tensors are views of the bank's and the
    base's own.
    """

    def __init__(
        self,
        *,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        segments: Sequence[int],
        down_AKD: Tensor,
        up_ARE: Tensor,
        gain_AE: Tensor | None,
        step: StepRouting,
    ) -> None:
        super().__init__()
        self.weight_ED = weight_ED
        self.bias_E = bias_E
        self.segments = list(segments)
        self.down_AKD, self.up_ARE, self.gain_AE = down_AKD, up_ARE, gain_AE
        self.step = step
        self.pending: tuple[Tensor, ...] | None = None
        self.blocks: Tensor | None = None
        if weight_ED.is_cuda:
            from loratune.engine.decoding_kernels import output_blocks  # Triton is there with CUDA.

            self.blocks = output_blocks(
                self.segments, rank=up_ARE.shape[1], device=weight_ED.device
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The members' outputs, each 1 x M x its width."""
        x_MD = x.view(-1, x.shape[-1])
        if self.blocks is None:
            y_ME, *_ = packed_linear(
                x_MD,
                None,
                [self.weight_ED],
                None,
                self.bias_E,
                [self.down_AKD],
                [self.up_ARE],
                self.gain_AE,
                self.step.routing,
                self.segments,
            )
        else:
            y_ME = self._by_kernels(x_MD, self.blocks)
        widths = [high - low for low, high in pairwise(self.segments)]
        return tuple(y.view(*x.shape[:-1], -1) for y in y_ME.split(widths, dim=1))

    def _by_kernels(self, x_MD: Tensor, blocks: Tensor) -> Tensor:
        from loratune.engine.decoding_kernels import adapter_outputs

        routing = Routing(*self.step.routing)
        plain = self.gain_AE is None
        y_ME = adapter_outputs(
            x_MD,
            self.down_AKD,
            self.up_ARE,
            routing,
            blocks=blocks,
            bias_E=self.bias_E if plain else None,
        )
        # One rounding of base and adapter together, and no pass over y for their sum.
        torch.addmm(y_ME, x_MD, self.weight_ED.t(), out=y_ME)
        if self.gain_AE is not None:
            y_ME = (y_ME * of_tokens(self.gain_AE, routing)).to(y_ME.dtype)
            if self.bias_E is not None:
                y_ME += self.bias_E
        return y_ME

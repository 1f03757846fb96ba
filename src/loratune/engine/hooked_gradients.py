"""Row gradients of one adapter on PEFT's layers, picked up by hooks while a batch goes backward.

The hooks read and change nothing, so that a probed update is bit for bit the update that it would
have been. A trained factor is the weight of a linear layer of PEFT's, whose input and whose
output's gradient are all that a row's own gradient takes; dropout, scale and DoRA's gain have
happened to them already. DoRA's magnitudes m stand in y = m / norm (W x + s B A x) and get the sum
over a row's tokens of D (W x + s B A x) / norm.

What is kept meanwhile are the factors' inputs, also where blocks are checkpointed: a probed update
of a checkpointed model takes more memory than others. Methods whose trained numbers stand anywhere
else (AdaLoRA's) are refused.

Legend: N rows of a micro-batch, T tokens, D in, E out.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional

from loratune.engine.row_gradients import (
    BLOCKS,
    NUM_KINDS,
    Block,
    ProbedRows,
    add_outer_squares,
    add_squares,
    inverse_second_moment,
    mean_squares,
)
from loratune.errors import StudyError
from loratune.methods.base import Attached
from loratune.records import Trial


class HookedGradients:
    """Looks at every row that goes backward while it is `watching`.

    `begin` comes before each micro-batch, `end` when all gradients are there. What goes backward is
    `loss_scale` times the loss; what is told is not.
    """

    def __init__(
        self,
        attached: Attached,
        optimizer: torch.optim.AdamW,
        trial: Trial,
        *,
        loss_scale: float = 1.0,
    ) -> None:
        self._loss_scale = loss_scale
        self._groups = attached.parameter_groups()
        self._block_of: dict[int, Block] = {
            id(parameter): cast("Block", group.name)
            for group in self._groups
            for parameter in group.parameters
        }
        self._layers = [
            module
            for module in attached.model.modules()
            if isinstance(module, nn.Linear | DoraLinearLayer)
            and id(module.weight) in self._block_of
        ]
        if len(self._layers) != len(self._block_of):
            raise StudyError(
                f"noise: method {trial.method.name!r} trains numbers that are neither A, B nor "
                "DoRA's magnitudes, whose single rows' gradients can't be told; leave it or noise "
                "out of the study"
            )
        self._inverse = dict[int, Tensor]()
        for group in self._groups:
            states = [optimizer.state[one] for one in group.parameters if one in optimizer.state]
            if not states:
                continue
            largest = torch.stack([state["exp_avg_sq"].max() for state in states]).max()
            self._inverse |= {
                id(parameter): inverse_second_moment(
                    optimizer.state[parameter]["exp_avg_sq"],
                    largest=largest,
                    beta2=trial.beta2,
                    num_updates=int(optimizer.state[parameter]["step"]),
                )
                for parameter in group.parameters
                if parameter in optimizer.state
            }
        self._parts = list[Tensor]()

    @contextmanager
    def watching(self) -> Generator[Self]:
        """The hooks are there for as long as the block runs."""
        handles = [
            layer.register_forward_hook(
                self._sees_magnitude if isinstance(layer, DoraLinearLayer) else self._sees_linear,
                with_kwargs=True,
            )
            for layer in self._layers
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, num_rows: int, device: torch.device) -> None:
        """The next `num_rows` rows go through the model."""
        shape = (num_rows, len(BLOCKS), NUM_KINDS)
        self._parts.append(torch.zeros(shape, dtype=torch.float64, device=device))

    def end(self) -> ProbedRows:
        """What was seen, in the order of the rows; the parameters hold the gradient of them all."""
        mean_32 = torch.zeros_like(self._parts[0][0])
        scaled = dict.fromkeys(BLOCKS, False)
        for group in self._groups:
            block = cast("Block", group.name)
            for parameter in group.parameters:
                inverse = self._inverse.get(id(parameter))
                scaled[block] |= inverse is not None and bool((inverse > 0).any())
                if parameter.grad is not None:
                    mean_32[BLOCKS.index(block)] += mean_squares(parameter.grad, inverse)
        names = {group.name for group in self._groups}
        return ProbedRows(
            squares_N32=torch.cat(self._parts) / self._loss_scale**2,
            mean_32=mean_32 / self._loss_scale**2,
            has_block={block: block in names for block in BLOCKS},
            is_scaled=scaled,
        )

    def _into(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        block = BLOCKS.index(self._block_of[id(weight)])
        return self._parts[-1][:, block], self._inverse.get(id(weight))

    def _sees_linear(self, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        del kwargs
        x_NTD = cast("Tensor", args[0]).detach()
        # DoRA also sends an identity matrix through, for a norm that is a constant.
        if output.requires_grad and output.ndim == 3:

            def add(grad_NTE: Tensor) -> None:
                into_N2, inverse = self._into(layer.weight)
                add_outer_squares(grad_NTE.float(), x_NTD.float(), inverse, into_N2=into_N2)

            _when_backward(output, add)

    def _sees_magnitude(self, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        x_NTD, base = cast("Tensor", args[0]).detach(), kwargs["base_layer"]
        given_NTE: Tensor | None = kwargs["base_result"]
        if given_NTE is None:  # Under dropout PEFT computes it anew, from what was not dropped.
            base_NTE = functional.linear(x_NTD, base.weight.to(x_NTD.dtype))
        else:
            base_NTE = given_NTE if base.bias is None else given_NTE - base.bias
        # PEFT returns y - W x with y = m / norm (W x + s B A x).
        before_NTE = ((output + base_NTE) / layer.weight).detach()

        def add(grad_NTE: Tensor) -> None:
            into_N2, inverse = self._into(layer.weight)
            add_squares((grad_NTE * before_NTE).sum(dim=1).float(), inverse, into_N2=into_N2)

        _when_backward(output, add)


def _when_backward(output: Tensor, add: Callable[[Tensor], None]) -> None:
    """Call `add` with the output's gradient once it is known."""

    def hook(gradient: Tensor) -> None:
        add(gradient.detach())

    output.register_hook(hook)  # pyright: ignore[reportUnusedCallResult, reportArgumentType]

"""AdamW for the trials of a pack: each with its own learning rate, betas, eps, decay, step and clip.

The formula is that of torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101):

    p -= lr wd p;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

A row has three regions, A, B and m, each with a learning rate, an eps and a decay of its own, so
that an adapter can be rescaled without a change to its training (`methods.base.ParameterGroup`). On CUDA
all rows that update are done by three launches (`engine.kernels`); on a CPU a row at a time by
torch's own fused AdamW.

Legend: A slots, P numbers of a slot, G = 3 regions.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from loratune.engine.slots import Slots

REGIONS = ("A", "B", "other")


@dataclass(frozen=True, slots=True)
class RowUpdate:
    """One optimizer step of one slot. `step` counts from 1; the tuples are by region.

    `max_grad_norm` None: no clipping. The gradient in the slot's row is `loss_scale` times the true
    one (above 1 where 16-bit gradients would vanish).
    """

    slot: int
    step: int
    learning_rates: tuple[float, float, float]
    beta1: float
    beta2: float
    eps: tuple[float, float, float]
    weight_decays: tuple[float, float, float]
    max_grad_norm: float | None
    loss_scale: float = 1.0


@torch.no_grad()
def update_rows(slots: Slots, updates: Sequence[RowUpdate]) -> Tensor:
    """Step the rows in place and refresh what their layers multiply with.

    A row whose gradient is not finite is left as it is.

    Returns:
        The norm of each row's gradient before clipping, float32, in the order of `updates`, on the
        device. The gradients are left as they are: the next batch's first step overwrites them.
    """
    if slots.params_AP.device.type == "cuda":
        from loratune.engine.kernels import adamw_rows  # Triton is there with CUDA alone.

        return adamw_rows(slots, updates)
    norms = [_update_row(slots, update) for update in updates]
    for update in updates:
        slots.refresh(update.slot)
    return torch.stack(norms)


def _update_row(slots: Slots, update: RowUpdate) -> Tensor:
    slot = update.slot
    gradient_P = slots.grads_AP[slot]
    if update.loss_scale != 1:
        gradient_P = gradient_P / update.loss_scale
    norm = torch.linalg.vector_norm(gradient_P)
    if not bool(torch.isfinite(norm)):
        return norm
    if update.max_grad_norm is not None:
        # As torch.nn.utils.clip_grads_with_norm_ does.
        gradient_P = gradient_P * torch.clamp(update.max_grad_norm / (norm + 1e-6), max=1.0)
    for region, (low, high) in enumerate(pairwise([0, *slots.layout.ends])):
        if low == high:
            continue
        adamw(
            [slots.params_AP[slot, low:high]],
            [gradient_P[low:high]],
            [slots.first_AP[slot, low:high]],
            [slots.second_AP[slot, low:high]],
            [],
            # torch counts the step up before it uses it.
            [torch.tensor(float(update.step - 1))],
            fused=True,
            amsgrad=False,
            beta1=update.beta1,
            beta2=update.beta2,
            lr=update.learning_rates[region],
            weight_decay=update.weight_decays[region],
            eps=update.eps[region],
            maximize=False,
        )
    return norm


def settings_table(updates: Sequence[RowUpdate]) -> list[list[float]]:
    """Each update's numbers as the kernel reads them, corrections for the bias worked out.

    lr, eps, lr * wd of the three regions, then beta1, 1 - beta1, beta2, 1 - beta2,
    1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t), the largest norm (infinite: no clipping), and
    1 / loss scale.
    """
    return [
        [
            *one.learning_rates,
            *one.eps,
            *(lr * wd for lr, wd in zip(one.learning_rates, one.weight_decays, strict=True)),
            one.beta1,
            1 - one.beta1,
            one.beta2,
            1 - one.beta2,
            1 / (1 - one.beta1**one.step),
            1 / math.sqrt(1 - one.beta2**one.step),
            math.inf if one.max_grad_norm is None else one.max_grad_norm,
            1 / one.loss_scale,
        ]
        for one in updates
    ]

"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): an SVD-form adapter pruned while it trains.

W x + scale B diag(E) A x with A and B normal (0.02) and E zero, at an initial rank above the
study's. Between the first and the last updates, PEFT's allocator scores every component by
sensitivity and uncertainty and masks E down to a budget that falls, on a cubic, to the study's
rank times the number of layers: layers end with different ranks. The orthogonality penalty that
PEFT adds inside its forward pass is ours to compute, once an update.

The allocator counts optimizer steps that are done, from 1, so that its last step exists whatever
the options say. The scale is the trial's, alpha over the *target* rank, whatever the budget is.

Exported, the adapter is a plain LoRA: A is diag(E) A of the components that are left, with PEFT's
rank_pattern; a layer that lost all of them stays in the file at rank 1 with B zero.
"""

# PEFT's layers and allocator carry no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.errors import ModelError, StudyError
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.base import Attached, ParameterGroup, number_option
from loratune.methods.peft_adapter import (
    ADAPTER,
    adapter_layers,
    attach_peft,
    copied,
    copy_into,
    files_of,
    generator,
    key_of,
    lora_config,
    short_names,
    trained_tensors,
    whole,
)
from loratune.methods.resident import Resident
from loratune.records import MethodChoice, Trial


@dataclass(frozen=True, slots=True)
class _Schedule:
    """Counts are in updates: `initial` before pruning starts, `final` after the last pruning."""

    initial_rank: int
    initial: int
    final: int
    interval: int
    total: int
    beta1: float
    beta2: float
    orthogonality_weight: float


@final
class Adalora:
    """PEFT's AdaLoRA with its allocator called at every update."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method`.

        Raises:
            StudyError: the updates, fractions or ranks leave nothing to prune or no time for it, or
                the initial rank is above the smaller side of a target's weight.
        """
        schedule = _schedule_of(trial)
        resident = Resident(model)
        try:
            config = AdaLoraConfig(
                target_r=trial.rank,
                init_r=schedule.initial_rank,
                # PEFT multiplies by lora_alpha / (initial rank + 1e-5).
                lora_alpha=cast("int", trial.scale * (schedule.initial_rank + 1e-5)),
                lora_dropout=trial.dropout,
                target_modules=short_names(model, targets),
                task_type="CAUSAL_LM",
                init_lora_weights=False,
                tinit=schedule.initial,
                tfinal=schedule.final,
                deltaT=schedule.interval,
                total_step=schedule.total,
                beta1=schedule.beta1,
                beta2=schedule.beta2,
                orth_reg_weight=schedule.orthogonality_weight,
            )
            attached = attach_peft(model, config, targets)
            layers = adapter_layers(attached, targets)
            _start(layers, schedule=schedule, seed=trial.seed)
        except BaseException:
            resident.restore()
            raise
        return AdaloraAttached(attached, trial, layers, resident=resident, schedule=schedule)


@final
class AdaloraAttached:
    """`methods.base.Attached` with the allocator's statistics and masks as further state."""

    def __init__(
        self,
        model: PeftModel,
        trial: Trial,
        layers: Mapping[str, Any],
        *,
        resident: Resident,
        schedule: _Schedule,
    ) -> None:
        self.model = model
        self._trial = trial
        self._layers = layers
        self._resident = resident
        self._schedule = schedule
        self._tuner = cast("Any", model.base_model)
        self._tensors = trained_tensors(model)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Groups "A", "B" and, for the singular values E, "other"."""
        halves = (("A", "lora_A"), ("B", "lora_B"), ("other", "lora_E"))
        return [
            ParameterGroup(name, [getattr(layer, kind)[ADAPTER] for layer in self._layers.values()])
            for name, kind in halves
        ]

    def penalty(self) -> Tensor | None:
        """weight * mean over all A and B of |A A' - I| and |B' B - I| (Frobenius norms).

        Equation 4 of the paper without its square, as in PEFT.
        """
        weight = self._schedule.orthogonality_weight
        if weight == 0:
            return None
        norms = list[Tensor]()
        for layer in self._layers.values():
            a_RD, b_ER = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            norms += [
                _distance_from_identity(a_RD @ a_RD.T),
                _distance_from_identity(b_ER.T @ b_ER),
            ]
        return weight * torch.stack(norms).mean()

    def after_backward(self, update: int) -> None:
        """Score every component and mask E down to the budget of this update.

        Raises:
            ModelError: a target layer has no gradient: no token went through it.
        """
        step = update + 1
        if step < self._schedule.total - self._schedule.final:
            for name, parameter in self._tensors.items():
                if parameter.grad is None:
                    raise ModelError(
                        f"adalora: {name} has no gradient, its layer was not used; "
                        "leave that layer out of targets"
                    )
        self._tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """Trained tensors, both running means of the allocator, the mask of each layer."""
        allocator = self._tuner.rankallocator
        masks: dict[str, list[bool]] = self._tuner.peft_config[ADAPTER].rank_pattern or {}
        return copied(
            {
                **{f"tensor.{name}": tensor for name, tensor in self._tensors.items()},
                **{f"sensitivity.{name}": mean for name, mean in allocator.exp_avg_ipt.items()},
                **{f"uncertainty.{name}": mean for name, mean in allocator.exp_avg_unc.items()},
                **{f"mask.{name}": torch.tensor(mask) for name, mask in masks.items()},
            }
        )

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `methods.base.Attached`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            parts.setdefault(kind, {})[rest] = tensor
        copy_into(self._tensors, parts.get("tensor", {}))
        device = next(iter(self._tensors.values())).device
        allocator = self._tuner.rankallocator
        allocator.reset_ipt()
        for name, mean in parts.get("sensitivity", {}).items():
            allocator.exp_avg_ipt[name] = mean.to(device, copy=True)
            # Its presence says that the means have begun; its value is never read again.
            allocator.ipt[name] = torch.zeros_like(allocator.exp_avg_ipt[name])
        for name, mean in parts.get("uncertainty", {}).items():
            allocator.exp_avg_unc[name] = mean.to(device, copy=True)
        masks = {name: mask.tolist() for name, mask in parts.get("mask", {}).items()}
        self._tuner.peft_config[ADAPTER].rank_pattern = masks or None

    def export(self) -> AdapterFiles:
        """See the module's docstring."""
        trial, tensors = self._trial, dict[str, Tensor]()
        ranks = dict[str, int]()
        for name, layer in self._layers.items():
            a_RD, b_ER = layer.lora_A[ADAPTER].detach(), layer.lora_B[ADAPTER].detach()
            e_R = layer.lora_E[ADAPTER].detach().flatten()
            left = e_R.nonzero().flatten()
            ranks[name] = max(1, len(left))
            if len(left) == 0:
                left, b_ER = torch.zeros(1, dtype=torch.long, device=e_R.device), 0 * b_ER
            tensors[key_of(name, "lora_A.weight")] = e_R[left, None] * a_RD[left]
            tensors[key_of(name, "lora_B.weight")] = b_ER[:, left]
        others = {name: rank for name, rank in ranks.items() if rank != trial.rank}
        config = lora_config(
            cast("PreTrainedModel", self._tuner.model),
            trial,
            list(self._layers),
            lora_alpha=whole(trial.scale * trial.rank),
            rank_pattern=others,
            alpha_pattern={name: trial.scale * rank for name, rank in others.items()},
        )
        return files_of(config, tensors)

    def detach(self) -> None:
        """See `methods.base.Attached`."""
        self._resident.restore()


def _distance_from_identity(gram_RR: Tensor) -> Tensor:
    identity = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
    return torch.linalg.matrix_norm(gram_RR - identity)


@torch.no_grad()
def _start(layers: Mapping[str, Any], *, schedule: _Schedule, seed: int) -> None:
    """A and B normal with deviation 0.02, E zero, as in PEFT and the paper's code."""
    for name, layer in layers.items():
        smaller = min(layer.get_base_layer().weight.shape)
        if schedule.initial_rank > smaller:
            raise StudyError(
                f"adalora: initial rank {schedule.initial_rank} is above {smaller}, the smaller "
                f"side of {name}; lower rank or initial_rank_ratio, or leave the layer out"
            )
        for half in ("lora_A", "lora_B"):
            live: nn.Parameter = getattr(layer, half)[ADAPTER]
            drawn = torch.empty(live.shape, dtype=torch.float32, device="cpu")
            live.copy_(drawn.normal_(0.0, 0.02, generator=generator(seed, f"{name}.{half}")))
        layer.lora_E[ADAPTER].zero_()
        # Over a 16-bit base PEFT rounds the rank to that precision and marks it as trainable.
        rank: nn.Parameter = layer.ranknum[ADAPTER]
        rank.requires_grad_(False).fill_(schedule.initial_rank)


def _schedule_of(trial: Trial) -> _Schedule:
    method, total = trial.method, trial.num_updates
    ratio = _option(method, "initial_rank_ratio")
    # Up, so that every ratio above 1 leaves something to prune; 1e-9 for 1.1 * 10 and its like.
    initial_rank = math.ceil(ratio * trial.rank - 1e-9)
    if initial_rank <= trial.rank:
        raise StudyError(
            f"adalora: initial_rank_ratio={ratio:g} starts at rank {initial_rank}, the target "
            "itself: there is nothing to prune; give a ratio above 1, or train lora"
        )
    early, late = _option(method, "initial_fraction"), _option(method, "final_fraction")
    if not _leaves_time(early, late, total=total):
        needed = next((n for n in range(1, 10_001) if _leaves_time(early, late, total=n)), None)
        raise StudyError(
            f"adalora: num_updates={total} with initial_fraction={early:g} and "
            f"final_fraction={late:g} leaves no updates to prune in; "
            + (
                "give fractions that sum to less than 1"
                if needed is None
                else f"train at least {needed} updates or lower the fractions"
            )
        )
    betas = _option(method, "beta1"), _option(method, "beta2")
    for name, beta in zip(("beta1", "beta2"), betas, strict=True):
        if not 0 < beta < 1:
            raise StudyError(f"adalora: {name}={beta:g}; give a number between 0 and 1")
    return _Schedule(
        initial_rank=initial_rank,
        initial=round(early * total),
        final=round(late * total),
        interval=int(_option(method, "interval")),
        total=total,
        beta1=betas[0],
        beta2=betas[1],
        orthogonality_weight=_option(method, "orthogonality_weight"),
    )


def _leaves_time(early: float, late: float, *, total: int) -> bool:
    """Whether the last pruning comes after the initial updates and has scores to go by.

    It happens at step total - final; scores begin with step 1 and stop before it.
    """
    last = total - round(late * total)
    return last >= 2 and last > round(early * total)


def _option(method: MethodChoice, key: str) -> float:
    return number_option(method, key, above=-1.0)


METHOD = Adalora()

"""Variants that start from a part of the base's weights: pissa, milora and olora.

Published code takes scale B0 A0 out of the base and trains B A from B0 A0 on what is left. Here the
base is never written to, because all trials share it: the part that would be taken out is a second,
frozen PEFT adapter beside the trained one,

    y = W x + scale B A dropout(x) - scale B0 A0 x,

which is the same function of A and B. The output starts at the base's, but for rounding of the size
of float32's on scale B0 A0 x (and for dropout, as in the published code). Exported, both adapters
become one LoRA of rank 2r on the untouched base.

Legend: D in, E out, R rank; W_ED is a layer's weight.
"""

# PEFT's layers carry no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.errors import ModelError, StudyError
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.peft_adapter import (
    ADAPTER,
    PeftAttached,
    adapter_layers,
    attach_peft,
    check_scale,
    files_of,
    group_AB,
    key_of,
    linear_layers,
    lora_config,
    quiet_peft,
    whole,
)
from loratune.methods.resident import Resident
from loratune.records import Trial

CORRECTION = "correction"

# A0_RD and B0_ER such that scale B0 A0 is the part that the method takes out of W_ED.
Factors = tuple[Tensor, Tensor]
# W_ED in float32 and the layer's name -> A0_RD, B0_ER; rank and scale are the trial's.
Factorise = Callable[[Tensor, str], Factors]


def attach_corrected(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str], *, factorise: Factorise
) -> PeftAttached:
    """Attach a trained adapter that starts at `factorise`'s factors, and their correction.

    The factors of the latest trial on each model are kept on the CPU, in float32 the size of the
    adapter itself: trials of one study differ in learning rate, batch size and seed, none of which
    the factors depend on.

    Raises:
        StudyError: the rank is above the smaller side of a target's weight.
        ModelError: a target is not a linear layer or its weight is not finite.
    """
    resident = Resident(model)
    try:
        # Before PEFT's layers exist: the slow part, and the one that judges the weights.
        factors = _factors_of(model, trial, targets, factorise=factorise)
        config = lora_config(model, trial, targets)
        attached = attach_peft(model, config, targets)
        frozen = lora_config(model, trial, targets, lora_dropout=0.0)
        with torch.random.fork_rng(devices=[]), quiet_peft():
            attached.add_adapter(CORRECTION, frozen)
        tuner: Any = attached.base_model
        tuner.set_adapter([ADAPTER, CORRECTION])
        layers = adapter_layers(attached, targets)
        check_scale(layers, trial)
        kept = _fill(layers, factors)
        attached.train(model.training)
    except BaseException:
        resident.restore()
        raise
    return PeftAttached(
        attached,
        resident=resident,
        groups=group_AB(layers),
        export=lambda: _export(model, trial, targets, layers),
        kept=kept,
    )


def singular_triplets(weight_ED: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U_EK, S_K (descending) and Vh_KD of the exact decomposition, K = min(D, E)."""
    u_EK, s_K, vh_KD = torch.linalg.svd(weight_ED, full_matrices=False)
    return u_EK, s_K, vh_KD


def qr(matrix_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Q_MK with orthonormal columns and the upper triangular R_KN, K = min(M, N)."""
    q_MK, r_KN = torch.linalg.qr(matrix_MN)
    return q_MK, r_KN


def split_evenly(u_ER: Tensor, s_R: Tensor, vh_RD: Tensor, *, scale: float) -> Factors:
    """A0 = sqrt(S/scale) Vh and B0 = U sqrt(S/scale), so that scale B0 A0 = U S Vh."""
    root_R = (s_R / scale).sqrt()
    return root_R[:, None] * vh_RD, u_ER * root_R


@torch.no_grad()
def _fill(layers: Mapping[str, Any], factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Put the factors in; returns the correction's tensors by name, which are state too.

    The correction is part of the state because a singular value decomposition that is computed
    again may differ in its last bits, with another number of threads for example.
    """
    kept = dict[str, Tensor]()
    for name, layer in layers.items():
        a0_RD, b0_ER = factors[name]
        layer.lora_A[ADAPTER].weight.copy_(a0_RD)
        layer.lora_B[ADAPTER].weight.copy_(b0_ER)
        layer.lora_A[CORRECTION].weight.copy_(a0_RD)
        layer.lora_B[CORRECTION].weight.copy_(-b0_ER)
        for half in (layer.lora_A, layer.lora_B):
            half[CORRECTION].weight.requires_grad_(False)
        kept[f"{name}.{CORRECTION}.A"] = layer.lora_A[CORRECTION].weight
        kept[f"{name}.{CORRECTION}.B"] = layer.lora_B[CORRECTION].weight
    return kept


def _export(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str], layers: Mapping[str, Any]
) -> AdapterFiles:
    """[B, -B0] [A; A0] of rank 2r, alpha doubled so that alpha/r stays the scale."""
    tensors = dict[str, Tensor]()
    for name, layer in layers.items():
        a, b = layer.lora_A, layer.lora_B
        both_a = torch.cat([a[ADAPTER].weight, a[CORRECTION].weight], dim=0)
        both_b = torch.cat([b[ADAPTER].weight, b[CORRECTION].weight], dim=1)
        tensors[key_of(name, "lora_A.weight")] = both_a
        tensors[key_of(name, "lora_B.weight")] = both_b
    rank = 2 * trial.rank
    config = lora_config(model, trial, targets, r=rank, lora_alpha=whole(trial.scale * rank))
    return files_of(config, tensors)


# The latest factors of each living model, and what they were computed from.
_latest: WeakKeyDictionary[nn.Module, tuple[object, dict[str, Factors]]] = WeakKeyDictionary()


def _factors_of(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str], *, factorise: Factorise
) -> dict[str, Factors]:
    weights = dict[str, Tensor]()
    for name, layer in linear_layers(model, targets).items():
        smaller = min(layer.weight.shape)
        if trial.rank > smaller:
            raise StudyError(
                f"{trial.method.name}: rank={trial.rank} is above {smaller}, the number of "
                f"singular values of {name}; choose at most {smaller} or leave the layer out"
            )
        weights[name] = layer.weight
    key = (
        trial.method,
        trial.rank,
        trial.scale,
        tuple(
            # Address and version change where a weight is replaced, moved or written into.
            (name, weight.data_ptr(), weight._version, weight.dtype, weight.device)  # pyright: ignore[reportPrivateUsage]  # torch's own count of writes has no public name
            for name, weight in weights.items()
        ),
    )
    known = _latest.get(model)
    if known is None or known[0] != key:
        _latest.pop(model, None)  # before the new ones, so that there are never two sets
        known = (key, {name: _checked(name, weights[name], factorise) for name in weights})
        _latest[model] = known
    return known[1]


@torch.no_grad()
def _checked(name: str, weight_ED: Tensor, factorise: Factorise) -> Factors:
    exact_ED = weight_ED.detach().to(torch.promote_types(weight_ED.dtype, torch.float32))
    if not bool(torch.isfinite(exact_ED).all()):
        raise ModelError(f"the weight of {name} is not finite; load the base model anew")
    a0_RD, b0_ER = factorise(exact_ED, name)
    # Clones, because a slice would keep the whole decomposition in memory.
    dense = torch.contiguous_format
    return a0_RD.cpu().clone(memory_format=dense), b0_ER.cpu().clone(memory_format=dense)

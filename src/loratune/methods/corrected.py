"""The start of variants that begin at a part of the base's weights: pissa, milora and olora.

Published code takes scale B0 A0 out of the base and trains B A from B0 A0 on what is left. Here the
base is never written to: A0 and B0 are a frozen part beside the trained one (see `lora_method`),
which is the same function of A and B. The output starts at the base's, but for rounding of the size
of float32's on scale B0 A0 x (and for dropout, as in the published code).

Legend: D in, E out, R rank; W_ED is a layer's weight.
"""

# torch.linalg carries no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.errors import ModelError, StudyError
from loratune.methods.base import LayerTensors
from loratune.methods.peft_adapter import exact_weight, linear_layers
from loratune.records import Trial

# A0_RD and B0_ER such that scale B0 A0 is the part that the method takes out of W_ED.
Factors = tuple[Tensor, Tensor]
# W_ED in float32 and the layer's name -> A0_RD, B0_ER; rank and scale are the trial's.
Factorise = Callable[[Tensor, str], Factors]


def start_corrected(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str], *, factorise: Factorise
) -> dict[str, LayerTensors]:
    """A and B at `factorise`'s factors, and these as the part that is taken out of the base.

    The last few factors of each layer are kept on the CPU, each in float32 the size of the layer's
    adapter: trials of one study differ in learning rate, batch size and seed, none of which the
    factors depend on, and a pack goes back and forth between a few methods.

    Raises:
        StudyError: the rank is above the smaller side of a target's weight.
        ModelError: a target is not a linear layer, or its weight is quantised or not finite.
    """
    layers = linear_layers(model, targets)
    for name, layer in layers.items():
        smaller = min(layer.in_features, layer.out_features)
        if trial.rank > smaller:
            raise StudyError(
                f"{trial.method.name}: rank={trial.rank} is above {smaller}, the number of "
                f"singular values of {name}; choose at most {smaller} or leave the layer out"
            )
    started = dict[str, LayerTensors]()
    for name, layer in layers.items():
        a0_RD, b0_ER = _factors_of(layer, name, trial, factorise)
        started[name] = LayerTensors(a0_RD.clone(), b0_ER.clone(), a0_RD=a0_RD, b0_ER=b0_ER)
    return started


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


# How many factors are kept for one layer: the three methods and one more option, rank or scale.
NUM_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class _Remembered:
    """The factors of one weight by method, rank and scale, the latest used last."""

    weight: ReferenceType[Tensor]
    # Address and version change where a weight is moved or written into.
    marks: tuple[object, ...]
    factors: OrderedDict[object, Factors]


_remembered: WeakKeyDictionary[nn.Linear, _Remembered] = WeakKeyDictionary()


def _factors_of(layer: nn.Linear, name: str, trial: Trial, factorise: Factorise) -> Factors:
    weight = layer.weight
    marks = (weight.data_ptr(), weight._version, weight.dtype, weight.device)  # pyright: ignore[reportPrivateUsage]  # torch's own count of writes has no public name
    known = _remembered.get(layer)
    if known is None or known.weight() is not weight or known.marks != marks:
        known = _Remembered(ref(weight), marks, OrderedDict())
        _remembered[layer] = known
    key = (name, trial.method, trial.rank, trial.scale)
    if key not in known.factors:
        while len(known.factors) >= NUM_REMEMBERED:
            known.factors.popitem(last=False)
        known.factors[key] = _checked(name, layer, factorise)
    known.factors.move_to_end(key)
    return known.factors[key]


@torch.no_grad()
def _checked(name: str, layer: nn.Linear, factorise: Factorise) -> Factors:
    exact_ED = exact_weight(layer, name)
    if not bool(torch.isfinite(exact_ED).all()):
        raise ModelError(f"the weight of {name} is not finite; load the base model anew")
    a0_RD, b0_ER = factorise(exact_ED, name)
    # Clones, because a slice would keep the whole decomposition in memory.
    dense = torch.contiguous_format
    return a0_RD.cpu().clone(memory_format=dense), b0_ER.cpu().clone(memory_format=dense)

"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on each output row's direction, magnitudes apart.

y = m * (W + scale B A) x / ||W + scale B A||, the norm over each row of the weight (one per output
feature, as in PEFT) and taken as a constant in the gradient, as section 4.3 of the paper suggests.
m starts at the norms of W, so that the output starts at the base's. Dropout falls on the input of
the base's part too, which is PEFT's reading; without dropout there is no difference.

Legend: A adapters, D in, E out, R rank; W_ED is a layer's weight.
"""

# torch.linalg carries no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.errors import ModelError
from loratune.methods.base import LayerTensors
from loratune.methods.lora import start_lora
from loratune.methods.lora_method import LoraMethod
from loratune.methods.peft_adapter import exact_weight, linear_layers
from loratune.records import Trial


@torch.no_grad()
def start_dora(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str]
) -> dict[str, LayerTensors]:
    """LoRA's start; B is zero, so that the magnitudes are the norms of W alone, in float32.

    Raises:
        ModelError: a target is not a linear layer, or its weight is quantised, not finite or has
            a row of zeros, which has no direction.
    """
    started = start_lora(model, trial, targets)
    for name, layer in linear_layers(model, targets).items():
        # PEFT's own call, so that its quotient m / ||W|| starts at exactly one.
        norm_E = cast("Tensor", torch.linalg.norm(exact_weight(layer, name), dim=1))
        if not bool(torch.isfinite(norm_E).all()):
            raise ModelError(f"the weight of {name} is not finite; load the base model anew")
        if not bool((norm_E > 0).all()):
            raise ModelError(
                f"dora: the weight of {name} has a row of zeros, which has no direction; "
                "leave that layer out of targets"
            )
        started[name] = replace(started[name], magnitude_E=norm_E)
    return started


@torch.no_grad()
def row_norms(
    weight_ED: Tensor, a_ARD: Tensor, b_AER: Tensor, scale_A: Tensor, weight_norm2_E: Tensor
) -> Tensor:
    """norm_AE = ||W + scale B A|| over D of every adapter; no tensor of E x D an adapter.

    With w a row of W and b the same row of B,

        ||w + s b A||^2 = ||w||^2 + 2 s b (A w') + s^2 b (A A') b'.

    float32 throughout, a constant in the gradient. A weight in 16 bits is cast once for all
    adapters. Where B A takes nearly all of a row of W away, the sum cancels: the relative error is
    about float32's times ||w||^2 / norm^2, and the square is never below zero.

    Args:
        weight_ED: in any precision.
        a_ARD: float32.
        b_AER: float32.
        scale_A: float32.
        weight_norm2_E: float32, each row's sum of squares: the square of DoRA's first magnitudes.
    """
    num_adapters, rank, d = a_ARD.shape
    # One product over all adapters; E x (A R) is what it leaves.
    wa_EAR = (weight_ED.float() @ a_ARD.reshape(-1, d).T).view(-1, num_adapters, rank)
    gram_ARR = a_ARD @ a_ARD.mT
    s_A1 = scale_A[:, None]
    cross_AE = (b_AER * wa_EAR.transpose(0, 1)).sum(-1)
    square_AE = ((b_AER @ gram_ARR) * b_AER).sum(-1)
    norm2_AE = weight_norm2_E + 2 * s_A1 * cross_AE + s_A1.square() * square_AE
    return norm2_AE.clamp_min(0).sqrt()


METHOD = LoraMethod(start_dora)

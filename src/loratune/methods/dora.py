"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on each output row's direction, magnitudes apart.

y = m * (W + scale B A) x / ||W + scale B A||, the norm over each row of the weight (one per output
feature, as in PEFT) and taken as a constant in the gradient, as section 4.3 of the paper suggests.
m starts at the norms of W, so that the output starts at the base's. Dropout falls on the input of
the base's part too, which is PEFT's reading; without dropout there is no difference.

Legend: D in, E out; W_ED is a layer's weight.
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
from loratune.methods.peft_adapter import linear_layers
from loratune.records import Trial


@torch.no_grad()
def start_dora(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str]
) -> dict[str, LayerTensors]:
    """LoRA's start; B is zero, so that the magnitudes are the norms of W alone, in float32.

    Raises:
        ModelError: a target is not a linear layer, or its weight is not finite or has a row of
            zeros, which has no direction.
    """
    started = start_lora(model, trial, targets)
    for name, layer in linear_layers(model, targets).items():
        # PEFT's own call, so that its quotient m / ||W|| starts at exactly one.
        norm_E = cast("Tensor", torch.linalg.norm(layer.weight.float(), dim=1))
        if not bool(torch.isfinite(norm_E).all()):
            raise ModelError(f"the weight of {name} is not finite; load the base model anew")
        if not bool((norm_E > 0).all()):
            raise ModelError(
                f"dora: the weight of {name} has a row of zeros, which has no direction; "
                "leave that layer out of targets"
            )
        started[name] = replace(started[name], magnitude_E=norm_E)
    return started


METHOD = LoraMethod(start_dora)

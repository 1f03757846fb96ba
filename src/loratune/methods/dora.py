"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on each output row's direction, magnitudes apart.

y = m * (W + scale B A) x / ||W + scale B A||, the norm over each row of the weight (one per output
feature, as in PEFT) and taken as a constant in the gradient, as section 4.3 of the paper suggests.
m starts at the norms of W, so that the output starts at the base's. Dropout falls on the input of
the base's part too, which is PEFT's reading; without dropout there is no difference.
"""

# PEFT's layers carry no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Mapping, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loratune.errors import ModelError
from loratune.methods.base import Attached, ParameterGroup
from loratune.methods.peft_adapter import (
    ADAPTER,
    PeftAttached,
    adapter_layers,
    attach_peft,
    check_scale,
    export_lora,
    group_AB,
    lora_config,
    start_lora,
)
from loratune.methods.resident import Resident
from loratune.records import Trial


@final
class Dora:
    """PEFT's LoRA with use_dora, its magnitudes computed in float32."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method`.

        Raises:
            ModelError: a target weight is not finite or has a row of zeros, which has no direction.
        """
        resident = Resident(model)
        try:
            config = lora_config(model, trial, targets, use_dora=True)
            attached = attach_peft(model, config, targets)
            layers = adapter_layers(attached, targets)
            check_scale(layers, trial)
            start_lora(layers, seed=trial.seed)
            _start_magnitudes(layers)
        except BaseException:
            resident.restore()
            raise
        magnitudes = [layer.lora_magnitude_vector[ADAPTER].weight for layer in layers.values()]
        return PeftAttached(
            attached,
            resident=resident,
            groups=[*group_AB(layers), ParameterGroup("other", magnitudes)],
            export=lambda: export_lora(layers, config, magnitudes=True),
        )


@torch.no_grad()
def _start_magnitudes(layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        magnitude_E: Tensor = layer.lora_magnitude_vector[ADAPTER].weight
        # B is zero: these are the norms of W alone, in the adapter's precision, not the base's.
        weight_ED: Tensor = layer.get_base_layer().weight
        # PEFT's own call, so that the quotient m / ||W|| starts at exactly one.
        norm_E = cast("Tensor", torch.linalg.norm(weight_ED.to(magnitude_E.dtype), dim=1))
        if not bool(torch.isfinite(norm_E).all()):
            raise ModelError(f"the weight of {name} is not finite; load the base model anew")
        if not bool((norm_E > 0).all()):
            raise ModelError(
                f"dora: the weight of {name} has a row of zeros, which has no direction; "
                "leave that layer out of targets"
            )
        magnitude_E.copy_(norm_E)


METHOD = Dora()

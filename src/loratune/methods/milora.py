"""MiLoRA (Wang et al. 2025, arXiv 2406.09044): starts from the last r singular components.

Full decomposition, the r smallest singular values, the root of S/scale on both sides (scale is
alpha/r), as in the authors' code.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from loratune.methods.base import LayerTensors
from loratune.methods.corrected import Factors, singular_triplets, split_evenly, start_corrected
from loratune.methods.lora_method import LoraMethod
from loratune.records import Trial


def start_milora(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str]
) -> dict[str, LayerTensors]:
    """Minor singular components; see `methods.corrected.start_corrected`."""

    def factorise(weight_ED: Tensor, name: str) -> Factors:
        del name  # the decomposition is exact: nothing is drawn
        u, s, vh = singular_triplets(weight_ED)
        r = trial.rank
        return split_evenly(u[:, -r:], s[-r:], vh[-r:], scale=trial.scale)

    return start_corrected(model, trial, targets, factorise=factorise)


METHOD = LoraMethod(start_milora)

"""OLoRA (Buyukakyuz 2024, arXiv 2406.01775): starts from each weight's QR decomposition.

W = Q R; B0 is the first r columns of Q, A0 the first r rows of R, and scale B0 A0 leaves the base,
as in PEFT (the factors themselves are not divided by the scale).
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from loratune.methods.base import LayerTensors
from loratune.methods.corrected import Factors, qr, start_corrected
from loratune.methods.lora_method import LoraMethod
from loratune.records import Trial


def start_olora(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str]
) -> dict[str, LayerTensors]:
    """Orthonormal B0; see `methods.corrected.start_corrected`."""

    def factorise(weight_ED: Tensor, name: str) -> Factors:
        del name  # nothing is drawn
        q_EK, r_KD = qr(weight_ED)
        return r_KD[: trial.rank], q_EK[:, : trial.rank]

    return start_corrected(model, trial, targets, factorise=factorise)


METHOD = LoraMethod(start_olora)

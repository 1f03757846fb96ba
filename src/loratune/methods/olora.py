"""OLoRA (Buyukakyuz 2024, arXiv 2406.01775): starts from each weight's QR decomposition.

W = Q R; B0 is the first r columns of Q, A0 the first r rows of R, and scale B0 A0 leaves the base,
as in PEFT (the factors themselves are not divided by the scale).
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor
from transformers import PreTrainedModel

from loratune.methods.base import Attached
from loratune.methods.corrected import Factors, attach_corrected, qr
from loratune.records import Trial


@final
class Olora:
    """Orthonormal B0, the base untouched."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method` and `methods.corrected.attach_corrected`."""

        def factorise(weight_ED: Tensor, name: str) -> Factors:
            del name  # nothing is drawn
            q_EK, r_KD = qr(weight_ED)
            return r_KD[: trial.rank], q_EK[:, : trial.rank]

        return attach_corrected(model, trial, targets, factorise=factorise)


METHOD = Olora()

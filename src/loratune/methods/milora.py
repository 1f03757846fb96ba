"""MiLoRA (Wang et al. 2025, arXiv 2406.09044): starts from the last r singular components.

Full decomposition, the r smallest singular values, the root of S/scale on both sides (scale is
alpha/r), as in the authors' code.
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor
from transformers import PreTrainedModel

from loratune.methods.base import Attached
from loratune.methods.corrected import Factors, attach_corrected, singular_triplets, split_evenly
from loratune.records import Trial


@final
class Milora:
    """Minor singular components, the base untouched."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method` and `methods.corrected.attach_corrected`."""

        def factorise(weight_ED: Tensor, name: str) -> Factors:
            del name  # the decomposition is exact: nothing is drawn
            u, s, vh = singular_triplets(weight_ED)
            r = trial.rank
            return split_evenly(u[:, -r:], s[-r:], vh[-r:], scale=trial.scale)

        return attach_corrected(model, trial, targets, factorise=factorise)


METHOD = Milora()

"""LoRA (Hu et al. 2022, arXiv 2106.09685): W x + scale B A x, A Kaiming-uniform, B zero."""

from collections.abc import Sequence
from typing import final

from transformers import PreTrainedModel

from loratune.methods.base import Attached
from loratune.methods.peft_adapter import attach_lora
from loratune.records import Trial


@final
class Lora:
    """PEFT's LoRA at scale alpha/r."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method`."""
        return attach_lora(model, trial, targets)


METHOD = Lora()

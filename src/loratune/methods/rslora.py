"""Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA at scale alpha/sqrt(r)."""

from collections.abc import Sequence
from typing import final

from transformers import PreTrainedModel

from loratune.methods.base import Attached
from loratune.methods.peft_adapter import attach_lora
from loratune.records import Trial


@final
class RsLora:
    """PEFT's LoRA with use_rslora; the exported config says so too."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method`."""
        return attach_lora(model, trial, targets, use_rslora=True)


METHOD = RsLora()

"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA whose B learns `ratio` times as fast as A.

The study's learning rate is A's, as in the paper; B's is ratio times it. eps and weight decay are
the same for both.
"""

from collections.abc import Sequence
from typing import final

from transformers import PreTrainedModel

from loratune.methods.base import Attached, number_option
from loratune.methods.peft_adapter import attach_lora
from loratune.records import Trial


@final
class LoraPlus:
    """PEFT's LoRA with a learning rate of its own for B."""

    def attach(self, model: PreTrainedModel, trial: Trial, *, targets: Sequence[str]) -> Attached:
        """See `methods.base.Method`.

        Raises:
            StudyError: a ratio that is not positive; B, which starts at zero, would stay there.
        """
        ratio = number_option(trial.method, "ratio", above=0.0)
        return attach_lora(model, trial, targets, lr_factor_B=ratio)


METHOD = LoraPlus()

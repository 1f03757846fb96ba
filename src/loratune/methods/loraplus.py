"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA whose B learns `ratio` times as fast as A.

The study's learning rate is A's, as in the paper; B's is ratio times it. eps and weight decay are
the same for both.
"""

from collections.abc import Mapping

from loratune.methods.base import AdamFactors, number_option
from loratune.methods.lora import start_lora
from loratune.methods.lora_method import LoraMethod
from loratune.records import Trial


def adam_factors(trial: Trial) -> Mapping[str, AdamFactors]:
    """The learning rate of B is multiplied by the option `ratio`.

    Raises:
        StudyError: a ratio that is not positive; B, which starts at zero, would stay there.
    """
    return {"B": AdamFactors(lr_factor=number_option(trial.method, "ratio", above=0.0))}


METHOD = LoraMethod(start_lora, adam_factors_of=adam_factors)

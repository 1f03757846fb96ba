"""What others found, as formulas to start from: never a result of the study at hand.

LR of LoRA by model width (LoRA Without Regret, Schulman et al. 2025), and batch size in tokens by
tokens trained on: Step Law (Li et al. 2025), Schaipp 2026, Power Lines (Bergsma et al. 2025).
The last three were fitted to pretraining; that they say anything of fine-tuning is an assumption.
"""

import math
from typing import Literal

from loratune.errors import AnalysisError

Family = Literal["llama", "qwen"]
Prior = Literal["step_law", "schaipp", "power_lines"]

WIDTH_EXPONENTS: dict[Family, float] = {"llama": 0.781, "qwen": 0.0775}
# Batch size in tokens = coefficient * tokens^exponent. Of Power Lines only the exponent is stated.
_PRIORS: dict[Prior, tuple[float | None, float]] = {
    "step_law": (0.58, 0.571),
    "schaipp": (0.667, 0.566),
    "power_lines": (None, 0.383),
}


def lora_learning_rate(hidden_size: int, *, family: Family) -> float:
    """5e-4 (2000 / hidden_size)^p, p = 0.781 for Llama and 0.0775 for Qwen.

    Raises:
        AnalysisError: another family, or a width that is not above 0.
    """
    if family not in WIDTH_EXPONENTS:
        raise AnalysisError(f"family={family!r}; known are {', '.join(WIDTH_EXPONENTS)}")
    if hidden_size <= 0:
        raise AnalysisError(f"hidden_size={hidden_size}; give the model's width, above 0")
    return 5e-4 * (2000 / hidden_size) ** WIDTH_EXPONENTS[family]


def prior_batch_tokens(tokens: float, *, prior: Prior) -> float:
    """The batch size in tokens that a published law gives for `tokens` of training.

    Raises:
        AnalysisError: an unknown law, one of which only the exponent is known, or tokens not
            above 0.
    """
    coefficient, exponent = _prior(prior)
    if coefficient is None:
        raise AnalysisError(
            f"prior={prior!r}: only its exponent is known; use `prior_ratio` between two budgets"
        )
    return coefficient * _positive(tokens) ** exponent


def prior_ratio(tokens: float, *, from_tokens: float, prior: Prior) -> float:
    """By what factor the batch size changes from one budget of tokens to another."""
    return (_positive(tokens) / _positive(from_tokens)) ** _prior(prior)[1]


def _prior(prior: Prior) -> tuple[float | None, float]:
    if prior not in _PRIORS:
        raise AnalysisError(f"prior={prior!r}; known are {', '.join(_PRIORS)}")
    return _PRIORS[prior]


def _positive(tokens: float) -> float:
    if not 0 < tokens < math.inf:
        raise AnalysisError(f"tokens={tokens}; give a positive number")
    return tokens

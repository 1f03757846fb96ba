"""The next token of every row: the likeliest, or drawn from its row's own numbers.

A row that samples brings one uniform number for each of its tokens, drawn on the host from its own
seed. The token is the first in the order of likelihood at which the summed probability passes that
number, so that a row's draws depend on nothing but its seed and its logits.

Temperature and top_p are those of transformers: logits over temperature; of the tokens in the order
of likelihood, those before which less than top_p has been summed up.

Legend: M rows, V vocabulary.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.errors import EvaluationError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's tokens are drawn; temperature above 0, top_p in (0, 1].

    Raises:
        EvaluationError: a value out of its range.
    """

    temperature: float
    seed: int
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise EvaluationError(
                f"temperature={self.temperature}; give a number above 0, or no sampling for the "
                "likeliest tokens"
            )
        if not 0 < self.top_p <= 1:
            raise EvaluationError(f"top_p={self.top_p}; give a number above 0 and at most 1")
        if self.seed < 0:
            raise EvaluationError(f"seed={self.seed}; give a seed of at least 0")

    def uniforms(self, count: int) -> NDArray[np.float32]:
        """The row's first numbers in [0, 1); more of them begin with the same."""
        # 24 bits each, exact in float32: rounded to float32, a double can become 1.
        drawn = np.random.default_rng(self.seed).integers(0, 2**24, size=count)
        return (drawn / 2**24).astype(np.float32)


def likeliest(logits_MV: Tensor) -> Tensor:
    """int64[M]; of equal ones the first."""
    return logits_MV.argmax(dim=-1)


def drawn(
    logits_MV: Tensor, *, temperature_M: Tensor, top_p_M: Tensor, uniform_M: Tensor
) -> Tensor:
    """int64[M]; the likeliest where the temperature is 0. The numbers are float32."""
    exact_MV = logits_MV.float()
    samples_M = temperature_M > 0
    scaled_MV = exact_MV / torch.where(samples_M, temperature_M, 1)[:, None]
    # Stable, so that equal logits keep one order on every device.
    sorted_MV, order_MV = scaled_MV.sort(dim=-1, descending=True, stable=True)
    likelihood_MV = sorted_MV.softmax(dim=-1)
    before_MV = likelihood_MV.cumsum(dim=-1) - likelihood_MV
    # The likeliest is always kept: nothing stands before it.
    is_kept_MV = before_MV < top_p_M[:, None]
    summed_MV = (likelihood_MV * is_kept_MV).cumsum(dim=-1)
    goal_M1 = (uniform_M * summed_MV[:, -1])[:, None]
    at_M = (summed_MV <= goal_M1).sum(dim=-1)
    # Rounding may leave the goal at the very end of the sum: then the last that is kept.
    last_M = is_kept_MV.sum(dim=-1) - 1
    token_M = order_MV.gather(1, torch.minimum(at_M, last_M)[:, None])[:, 0]
    return torch.where(samples_M, token_M, likeliest(logits_MV))

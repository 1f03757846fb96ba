"""The next token of every row: the likeliest, or drawn from its row's own numbers.

A row that samples brings one key for each of its tokens, drawn on the host from its own seed. Key
and token of the vocabulary give a number of Gumbel's distribution, and the token is the one where
logit and number together are highest (Gumbel, 1954: so it comes as often as softmax says). A row's
draws thus depend on nothing but its seed and its logits, and hardly ever on a rounding error of
those: only where the best two sums are as near to each other as that. Summing up likelihoods until
a uniform number is passed would let an error anywhere in the vocabulary choose another token.

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

from loratune.engine.mixing import mixed
from loratune.errors import EvaluationError

# Stands for a token where there was none to choose.
NOT_FINITE = -1


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

    def keys(self, count: int) -> NDArray[np.int32]:
        """The row's first keys, one a token; more of them begin with the same."""
        drawn_up = np.random.default_rng(self.seed).integers(0, 2**32, size=count, dtype=np.uint32)
        return drawn_up.view(np.int32)


def likeliest(logits_MV: Tensor) -> Tensor:
    """int64[M]; of equal ones the first."""
    return logits_MV.argmax(dim=-1)


def or_not_finite(token_M: Tensor, logits_MV: Tensor) -> Tensor:
    """The tokens, NOT_FINITE where a row's logits are not numbers to choose by; no device waits.

    The highest of a row with a NaN or plus infinity is one of those.
    """
    return torch.where(logits_MV.amax(dim=-1).isfinite(), token_M, NOT_FINITE)


def drawn(logits_MV: Tensor, *, temperature_M: Tensor, top_p_M: Tensor, key_M: Tensor) -> Tensor:
    """int64[M]; the likeliest where the temperature is 0. `key_M` is int32, the others float32."""
    samples_M = temperature_M > 0
    scaled_MV = logits_MV.float() / torch.where(samples_M, temperature_M, 1)[:, None]
    # Stable, so that equal logits keep one order on every device.
    sorted_MV, order_MV = scaled_MV.sort(dim=-1, descending=True, stable=True)
    likelihood_MV = sorted_MV.softmax(dim=-1)
    before_MV = likelihood_MV.cumsum(dim=-1) - likelihood_MV
    # The likeliest is always kept: nothing stands before it. Without top_p all are, though a
    # rounded sum may reach 1 before the last.
    is_kept_MV = (before_MV < top_p_M[:, None]) | (top_p_M >= 1)[:, None]
    is_kept_MV = torch.zeros_like(is_kept_MV).scatter_(-1, order_MV, is_kept_MV)
    goal_MV = (scaled_MV + _gumbel(key_M, scaled_MV.shape[1])).masked_fill(
        ~is_kept_MV, float("-inf")
    )
    return torch.where(samples_M, goal_MV.argmax(dim=-1), likeliest(logits_MV))


def _gumbel(key_M: Tensor, vocab_size: int) -> Tensor:
    """float32[M, V] of the standard distribution, a pure function of key and token."""
    tokens_V = torch.arange(vocab_size, dtype=torch.int32, device=key_M.device)
    bits_MV = mixed(key_M[:, None] ^ mixed(tokens_V)[None, :])
    # The highest numbers decide, and they come from the smallest of these: 31 bits there, where
    # float32 is finest. At the other end 1 would give minus infinity.
    uniform_MV = (((bits_MV & 0x7FFFFFFF).float() + 0.5) / 2**31).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform_MV))

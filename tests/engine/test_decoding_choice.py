"""The next token against transformers' own warpers and a chi-square test of its draws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from loratune.engine.decoding_choice import Sampling, drawn, likeliest
from loratune.errors import EvaluationError


def draws(logits_V: Tensor, *, temperature: float, top_p: float, count: int) -> Tensor:
    keys = Sampling(temperature=temperature, top_p=top_p, seed=3).keys(count)
    return drawn(
        logits_V.expand(count, -1),
        temperature_M=torch.full((count,), temperature),
        top_p_M=torch.full((count,), top_p),
        key_M=torch.from_numpy(keys),
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
def test_tokens_come_as_often_as_transformers_warpers_say(temperature: float, top_p: float):
    logits_V = 2 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    ids: Any = torch.zeros(1, 1).long()
    warmed: Any = logits_V[None]
    scores: Any = TemperatureLogitsWarper(temperature)(ids, warmed)
    scores = TopPLogitsWarper(top_p)(ids, scores)
    likelihood_V = scores[0].double().softmax(-1).numpy()
    found = draws(logits_V, temperature=temperature, top_p=top_p, count=20_000)
    counts = np.bincount(found.numpy(), minlength=12)
    possible = likelihood_V > 0
    assert counts[~possible].sum() == 0
    if possible.sum() == 1:
        return
    # One draw in 10,000 fails by chance; the draws are always the same.
    assert chisquare(counts[possible], 20_000 * likelihood_V[possible]).pvalue > 1e-4


def test_a_row_without_temperature_takes_the_likeliest_beside_rows_that_sample():
    logits_MV = torch.randn(200, 30, generator=torch.Generator().manual_seed(2))
    temperature_M = torch.tensor([0.0, 5.0]).repeat(100)
    found = drawn(
        logits_MV,
        temperature_M=temperature_M,
        top_p_M=torch.ones(200),
        key_M=torch.from_numpy(Sampling(temperature=5.0, seed=3).keys(200)),
    )
    greedy = likeliest(logits_MV)
    assert torch.equal(found[::2], greedy[::2])
    assert (found[1::2] != greedy[1::2]).float().mean() > 0.7


def test_what_top_p_leaves_out_never_comes_and_the_rest_does():
    # 3.0 and 2.0 hold 0.92; what stands before 1.0 is more than top_p.
    logits_V = torch.tensor([1.0, 3.0, 2.0, -40.0])
    assert set(draws(logits_V, temperature=1.0, top_p=0.9, count=1000).tolist()) == {1, 2}


@pytest.mark.parametrize(("moved_by", "most"), [(1e-6, 0.0), (1e-2, 0.03)])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_a_rounding_error_of_the_logits_hardly_ever_draws_another_token(
    moved_by: float, most: float, top_p: float
):
    """Two sums are nearer than the error about so often; an error of 16 bits is the second.

    Logits lie so close that the first makes some change places in the order of likelihood.
    """
    generator = torch.Generator().manual_seed(5)
    logits_MV = 0.3 * torch.randn(400, 12_000, generator=generator)
    moved_MV = logits_MV + moved_by * torch.randn(400, 12_000, generator=generator)
    how = {
        "temperature_M": torch.ones(400),
        "top_p_M": torch.full((400,), top_p),
        "key_M": torch.from_numpy(Sampling(temperature=3.0, seed=8).keys(400)),
    }
    changed_M = drawn(logits_MV, **how) != drawn(moved_MV, **how)
    assert changed_M.float().mean() <= most


def test_draws_from_a_large_vocabulary_come_as_often_as_their_logits_say():
    """Half of all likelihood lies in four tokens, half in 20,000 that are equally unlikely."""
    logits_V = torch.zeros(20_004)
    logits_V[:4] = math.log(5000)
    found = draws(logits_V, temperature=1.0, top_p=1.0, count=2000).numpy()
    groups = np.where(found < 4, found, 4 + (found - 4) // 5000)
    # One in 10,000 fails by chance; the draws are always the same.
    assert chisquare(np.bincount(groups, minlength=8)).pvalue > 1e-4


def test_keys_of_a_seed_are_its_own_and_longer_answers_begin_alike():
    keys = Sampling(temperature=1.0, seed=11).keys(1000)
    assert keys.dtype == np.int32
    assert len(set(keys.tolist())) == 1000
    assert np.array_equal(Sampling(temperature=1.0, seed=11).keys(7), keys[:7])
    assert not np.array_equal(Sampling(temperature=1.0, seed=12).keys(7), keys[:7])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0, "seed": 1}, "temperature=0.0; give a number above 0"),
        ({"temperature": float("nan"), "seed": 1}, "temperature=nan"),
        ({"temperature": 1.0, "seed": 1, "top_p": 0.0}, "top_p=0.0; give a number above 0"),
        ({"temperature": 1.0, "seed": 1, "top_p": 1.1}, "at most 1"),
        ({"temperature": 1.0, "seed": -1}, "seed=-1; give a seed of at least 0"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str):
    with pytest.raises(EvaluationError, match=message):
        Sampling(**values)  # pyright: ignore[reportArgumentType]

"""The next token against transformers' own warpers and a chi-square test of its draws."""

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
    uniforms = Sampling(temperature=temperature, top_p=top_p, seed=3).uniforms(count)
    return drawn(
        logits_V.expand(count, -1),
        temperature_M=torch.full((count,), temperature),
        top_p_M=torch.full((count,), top_p),
        uniform_M=torch.from_numpy(uniforms),
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
        uniform_M=torch.rand(200, generator=torch.Generator().manual_seed(3)),
    )
    greedy = likeliest(logits_MV)
    assert torch.equal(found[::2], greedy[::2])
    assert (found[1::2] != greedy[1::2]).float().mean() > 0.7


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_extremes_of_the_uniform_number_choose_the_first_and_the_last_that_is_kept(
    uniform: float,
):
    logits_V = torch.tensor([1.0, 3.0, 2.0, -40.0])
    (found,) = drawn(
        logits_V[None],
        temperature_M=torch.ones(1),
        top_p_M=torch.tensor([0.9]),
        uniform_M=torch.tensor([uniform]),
    ).tolist()
    # 3.0 and 2.0 hold 0.92; what stands before 1.0 is more than top_p.
    assert found == (1 if uniform == 0 else 2)


def test_numbers_of_a_seed_are_below_one_and_longer_answers_begin_alike():
    sampling = Sampling(temperature=1.0, seed=11)
    numbers = sampling.uniforms(1000)
    assert numbers.dtype == np.float32
    assert 0 <= numbers.min() < numbers.max() < 1
    assert np.array_equal(sampling.uniforms(7), numbers[:7])
    assert not np.array_equal(Sampling(temperature=1.0, seed=12).uniforms(7), numbers[:7])


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

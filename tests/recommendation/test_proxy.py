"""The answer of a proxy, from simulated results of both models."""

from dataclasses import replace

import pytest

from loratune.errors import AnalysisError
from loratune.recommendation.proxy import ModelOfPair, ProxyPair, recommend_by_proxy
from loratune.records import TrialResult
from simulated import result

PAIR = ProxyPair(
    proxy=ModelOfPair("small", "llama", 10**6, 128, 4, 6e6),
    target=ModelOfPair("large", "llama", 28 * 10**6, 512, 8, 1.7e8),
    sweep_flops=1e15,
    method="lora",
    folder="proxy",
)
RATES = (1e-3, 3e-3, 1e-2)


def trials(
    losses: dict[int, float],
    *,
    model: str = "small",
    best_rate: float = 3e-3,
    status: str = "done",
    rank: int = 4,
) -> list[TrialResult]:
    """Three seeds at three LRs for each batch size; `losses` are those of the best LR."""
    made = [
        result(
            loss + (0.0 if rate == best_rate else 0.2) + 1e-4 * seed * (1 + size % 3),
            batch_size=size,
            learning_rate=rate,
            seed=seed,
            status=status,
            model=model,
            rank=rank,
        )
        for size, loss in losses.items()
        for rate in RATES
        for seed in range(3)
    ]
    # The two models see the same rows.
    return [replace(one, trial=replace(one.trial, data_fingerprint="rows")) for one in made]


PROXY = trials({4: 1.2, 16: 1.0, 64: 1.3})


def target(best_rate: float = 3e-3, *, size: int = 16, status: str = "done") -> list[TrialResult]:
    return trials({size: 0.7}, model="large", best_rate=best_rate, rank=8, status=status)


def test_the_batch_size_is_the_proxys_and_the_learning_rate_the_targets_own():
    answer = recommend_by_proxy(PROXY, target(), pair=PAIR)
    assert answer.undecided == ()
    assert (answer.batch_size, answer.learning_rate) == (16, 3e-3)
    assert (answer.model, answer.rank) == ("large", 8)
    assert [(one.learning_rate, one.num_seeds) for one in answer.confirmed] == [
        (rate, 3) for rate in RATES
    ]
    assert answer.extrapolated_over == (
        "model: small (1M parameters) to large (28M parameters)",
        "rank: 4 to 8",
    )
    tokens = [
        sum(one.outcome.num_tokens for one in some if one.outcome) for some in (PROXY, target())
    ]
    assert answer.cost_fraction == pytest.approx((tokens[0] * 6e6 + tokens[1] * 1.7e8) / 1e15)


@pytest.mark.parametrize(
    ("proxy", "of_target", "reason"),
    [
        (PROXY, [], "no trial of large has finished"),
        (PROXY, target(1e-2), "best learning rate of large, 0.01, is at the end of those tried"),
        (PROXY, target(status="diverged"), "large diverged at every learning rate tried"),
        (
            PROXY,
            target(size=64),
            "the proxy now says batch size 16, and the target was trained",
        ),
        (trials({16: 1.0}), [], "on the proxy small: only batch size 16 has a score"),
        (trials({4: 1.0, 16: 1.1}, status="diverged"), [], "on the proxy small:"),
    ],
)
def test_what_cannot_be_concluded_is_said_and_no_number_stands_beside_it(proxy, of_target, reason):
    answer = recommend_by_proxy(proxy, of_target, pair=PAIR)
    assert any(reason in one for one in answer.undecided), answer.undecided
    assert answer.batch_size is answer.learning_rate is answer.acceptable_batch_sizes is None


def test_a_proxy_that_saw_other_rows_or_another_method_is_refused():
    other = [replace(one, trial=replace(one.trial, data_fingerprint="others")) for one in target()]
    with pytest.raises(AnalysisError, match="different rows"):
        recommend_by_proxy(PROXY, other, pair=PAIR)
    pissa = [
        replace(one, trial=replace(one.trial, method=replace(one.trial.method, name="pissa")))
        for one in target()
    ]
    with pytest.raises(AnalysisError, match="should have one cell, of lora"):
        recommend_by_proxy(PROXY, pissa, pair=PAIR)


def test_the_learning_rate_is_carried_by_lora_without_regrets_law():
    # Its own figures: Llama-3.2-1B (width 2048) 4.908e-4, Llama-3.1-8B (4096) 2.856e-4.
    pair = replace(
        PAIR,
        proxy=replace(PAIR.proxy, hidden_size=2048),
        target=replace(PAIR.target, hidden_size=4096),
    )
    assert pair.carried(4.908e-4) == pytest.approx(2.856e-4, rel=1e-3)
    unknown = replace(
        pair,
        proxy=replace(pair.proxy, model_type="gemma3_text"),
        target=replace(pair.target, model_type="gemma3_text"),
    )
    assert unknown.carried(1e-3) == 1e-3
    assert "no law is known" in unknown.law()
    assert ProxyPair.from_json(pair.to_json()) == pair
    with pytest.raises(AnalysisError, match="not what `loratune tune` wrote"):
        ProxyPair.from_json("{}")

"""The answer of a proxy, from simulated results of both models."""

import math
from dataclasses import replace

import pytest

from loratune.errors import AnalysisError
from loratune.recommendation.proxy import (
    ModelOfPair,
    ProxyPair,
    expected_rate,
    proxy_answer,
    recommend_by_proxy,
    search_target,
)
from loratune.records import TrialResult
from loratune.report.text import recommendation_text
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


def beside(losses: dict[int, float]) -> list[TrialResult]:
    """One trial at each batch size beside, at the LR that is best on the target."""
    rows = trials(losses, model="large", rank=8)
    return [one for one in rows if one.trial.learning_rate == 3e-3 and one.trial.seed == 0]


def test_a_batch_size_beside_the_proxys_is_the_answer_where_the_target_scores_better_there():
    answer = recommend_by_proxy(PROXY, target(), beside({8: 0.8, 32: 0.6}), pair=PAIR)
    assert (answer.batch_size, answer.learning_rate) == (32, 3e-3)
    # What is as good as 32 on the target nobody knows, the proxy least of all.
    assert (answer.batch_size_low, answer.batch_size_high) == (None, None)
    assert answer.acceptable_batch_sizes is None
    assert any(
        "scored better at batch size 32 than at the 16 of small, 0.6 (1 seed) against "
        "0.7002 (3 seeds)" in note
        for note in answer.evidence.notes
    ), answer.evidence.notes
    assert "95%" not in recommendation_text(answer)
    assert {one.batch_size for one in answer.confirmed} == {8, 16, 32}
    worse = recommend_by_proxy(PROXY, target(), beside({8: 0.8, 32: 0.75}), pair=PAIR)
    assert (worse.batch_size, worse.batch_size_high) == (16, 16)
    assert worse.cost_fraction is not None
    assert worse.cost_fraction > (recommend_by_proxy(PROXY, target(), pair=PAIR).cost_fraction or 1)
    # What was trained beside an earlier answer of the proxy says nothing of this one.
    stale = recommend_by_proxy(PROXY, target(), beside({64: 0.1}), pair=PAIR)
    assert stale.batch_size == 16


def test_batch_sizes_that_the_target_contradicts_are_not_called_as_good():
    flat = trials({4: 1.0003, 8: 1.0005, 16: 1.0, 32: 1.001, 64: 1.3})
    alone = recommend_by_proxy(flat, target(), pair=PAIR)
    assert alone.acceptable_batch_sizes == (4, 8, 16, 32)
    # Three times as bad at 8, on the target itself: then 4, farther off, is no better.
    answer = recommend_by_proxy(flat, target(), beside({8: 2.0, 32: 0.701}), pair=PAIR)
    assert (answer.batch_size, answer.batch_size_low) == (16, 16)
    assert answer.acceptable_batch_sizes == (16, 32)
    assert any(
        "batch size 8 is left out" in note and "more than 0.5% worse there, 2 against" in note
        for note in answer.evidence.notes
    )
    text = recommendation_text(answer)
    assert (
        "Within 0.5% of the best on small with 95% confidence, and not contradicted by large: "
        "16, 32." in text
    )
    diverged = [
        replace(one, status="diverged", outcome=replace(one.outcome, status="diverged",
                validation_loss=None))
        for one in beside({8: 1.0}) if one.outcome is not None
    ]  # fmt: skip
    answer = recommend_by_proxy(flat, target(), diverged, pair=PAIR)
    assert answer.acceptable_batch_sizes == (16, 32)
    assert any("large diverged there" in note for note in answer.evidence.notes)


def test_the_answer_keeps_its_distance_from_a_learning_rate_that_diverged():
    rows = trials({16: 0.7}, model="large", rank=8)
    made = [
        replace(one, status="diverged", outcome=None if one.outcome is None else replace(
            one.outcome, status="diverged", validation_loss=None))
        if one.trial.learning_rate == 1e-2
        else one
        for one in rows
    ]  # fmt: skip
    near = [
        replace(one, trial=replace(one.trial, learning_rate=7e-3), outcome=replace(
            one.outcome, validation_loss=0.6))
        for one in rows
        if one.trial.learning_rate == 3e-3 and one.outcome is not None
    ]  # fmt: skip
    answer = recommend_by_proxy(PROXY, [*made, *near], pair=PAIR)
    assert answer.learning_rate == 3e-3  # 7e-3 scored better, and 1e-2 diverged
    assert any("diverged at learning rate 0.01" in note for note in answer.evidence.notes)


class Target:
    """Trains a bowl: best at `rate`, and at batch size `size`; LRs above `cliff` diverge."""

    def __init__(self, rate: float, size: int = 16, cliff: float = math.inf) -> None:
        self.rate, self.size, self.cliff = rate, size, cliff
        self.asked: list[tuple[tuple[int, ...], tuple[float, ...]]] = []

    def __call__(self, sizes: tuple[int, ...], rates: tuple[float, ...]) -> list[TrialResult]:
        self.asked.append((sizes, rates))
        return [
            result(
                1 + 0.1 * math.log(rate / self.rate) ** 2 + 0.02 * math.log2(size / self.size) ** 2,
                batch_size=size,
                learning_rate=rate,
                status="diverged" if rate > self.cliff else "done",
                model="large",
            )
            for size in sizes
            for rate in rates
        ]


def test_the_target_is_searched_about_what_is_expected_then_between_then_beside():
    train = Target(2.4e-3)
    search_target(train, batch_size=16, expected=2e-3, sizes=(1, 2, 4, 8, 16, 32))
    first, refined, last = train.asked
    assert first == ((16,), (1.3e-3, 2e-3, 3e-3))
    # The bowl is a parabola in log LR: its lowest point is found, to two digits.
    assert refined == ((16,), (1.3e-3, 2e-3, 2.4e-3, 3e-3))
    assert last == ((8, 32), (2.4e-3,))
    close = Target(2.05e-3)
    search_target(close, batch_size=16, expected=2e-3, sizes=(16,))
    assert len(close.asked) == 1  # 2.05e-3 is not worth a trial, and 8 and 32 may not be answered


def test_no_time_left_ends_the_search_where_it_is():
    search_target(lambda *_: None, batch_size=16, expected=2e-3, sizes=(8, 16))


def test_where_the_best_rate_is_close_to_divergence_a_lower_one_is_tried():
    train = Target(2.9e-3, cliff=2.9e-3)
    search_target(train, batch_size=16, expected=2e-3, sizes=(16,))
    # 3e-3 diverged, 2e-3 is the best; 3e-3 / 1.8 is far enough below, and 1.3e-3 too far.
    assert train.asked[-1] == ((16,), (1.3e-3, 1.7e-3, 2e-3, 3e-3))


def test_the_expected_rate_is_read_off_between_those_tried_on_the_proxy():
    bowl = Target(2.4e-3)
    rows = bowl((8, 16, 32), (1e-3, 2e-3, 4e-3))
    seeds = [
        replace(one, trial=replace(one.trial, seed=seed), outcome=replace(one.outcome,
                validation_loss=(one.outcome.validation_loss or 0.0) * (1 + 1e-7 * seed)))
        for one in rows for seed in (0, 1) if one.outcome is not None
    ]  # fmt: skip
    answer = proxy_answer(seeds, method="lora")
    assert (answer.batch_size, answer.learning_rate) == (16, 2e-3)
    same = replace(PAIR, target=replace(PAIR.target, hidden_size=PAIR.proxy.hidden_size))
    assert expected_rate(seeds, answer, pair=same) == pytest.approx(2.4e-3, rel=1e-4)
    assert expected_rate(seeds, answer, pair=PAIR) == pytest.approx(PAIR.carried(2.4e-3), rel=1e-4)

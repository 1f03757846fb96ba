"""What cheaper versions of a study would cost, against plans and counts of the real ones."""

import pytest

from loratune.new_study import PROXY_GRIDS
from loratune.planning.alternatives import (
    TRIALS_OF_TARGET,
    ProxySearch,
    adaptive_alternative,
    proxy_alternative,
)
from loratune.planning.build import Plan, make_plan
from loratune.planning.cost import H100
from loratune.planning.search_space import USUAL_SHARE, most_trials
from loratune.study.schema import Study
from planned_studies import DATA, model, study

SIZES = "[1, 2, 4, 8]"


def plan_of(one: Study) -> Plan:
    return make_plan(one, models={"small": model()}, data={("small", None): DATA}, rate=H100)


def test_an_adaptive_search_costs_what_its_own_plan_says_for_the_usual_share_of_trials():
    grid = study(
        batch_size=SIZES, learning_rate="[1e-4, 1e-3, 1e-2]", seeds="3", methods="[lora, pissa]"
    )
    (found,) = plan_of(grid).alternatives
    assert found.kind == "adaptive"
    searched = study(
        batch_size=SIZES,
        learning_rate="{search: adaptive, low: 1e-4, high: 1e-2}",
        seeds="3",
        methods="[lora, pissa]",
    )
    its_own = plan_of(searched)
    assert its_own.alternatives == ()
    assert found.most_trials == its_own.to_json()["num_trials"] == 2 * most_trials(grid)
    assert found.most_trials is not None
    assert found.num_trials == 2 * round(USUAL_SHARE * most_trials(grid))
    assert found.flops == pytest.approx(its_own.flops * found.num_trials / found.most_trials)
    assert found.share == pytest.approx(found.flops / plan_of(grid).flops)


def test_a_proxy_is_searched_as_tune_does_and_the_target_gets_its_few_trials():
    grid = study(batch_size=SIZES, learning_rate="[1e-4, 1e-3, 1e-2]", seeds="3")
    made = plan_of(grid)
    sizes, rates, further = PROXY_GRIDS[0]
    search = ProxySearch(sizes, rates.count(",") + 1, further)
    # 56 rows are left of 64: 1, 2 and 4 make 8 updates. Two LRs, then two seeds at both.
    assert search.num_trials(56) == 3 * (2 + 2 * 2)
    found = proxy_alternative(
        grid,
        made.trials,
        made.costs,
        flops=made.flops,
        proxies={"small": ("tiny", 0.1)},
        search=search,
    )
    assert found is not None
    of_one = made.flops / len(made.trials)  # the same tokens at every batch size
    on_proxy = search.num_trials(made.trials[0].num_train_rows)
    assert found.num_trials == on_proxy + TRIALS_OF_TARGET
    assert found.flops == pytest.approx((0.1 * on_proxy + TRIALS_OF_TARGET) * of_one, rel=0.02)
    assert "tiny in the place of small (0.1 of its size, by the names)" in found.basis
    unknown = proxy_alternative(
        grid, made.trials, made.costs, flops=made.flops, proxies={}, search=search
    )
    assert unknown is not None
    assert "no smaller model is known for small: one of 0.062 of its size" in unknown.basis
    assert unknown.flops < found.flops


def test_where_one_point_is_tried_there_is_nothing_to_search():
    one = study()
    made = plan_of(one)
    assert made.alternatives == ()
    assert (
        proxy_alternative(
            one,
            made.trials,
            made.costs,
            flops=made.flops,
            proxies={},
            search=ProxySearch((1,), 1, 0),
        )
        is None
    )
    assert adaptive_alternative(one, made.trials, made.costs, flops=made.flops) is None

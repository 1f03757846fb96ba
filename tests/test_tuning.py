"""Tuning by a proxy: what is trained in which order, with a stub in the place of engines."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loratune import api
from loratune.data.demo_task import generate_rows
from loratune.errors import LoratuneError, ModelError, StudyError
from loratune.new_study import PROXY_GRIDS, finest_grid
from loratune.records import Trial
from loratune.study.loading import LoadedStudy
from loratune.sweep import Sweep
from loratune.training import Interrupted
from loratune.tuning import Tuning, tune
from stub_sweep import StubEngine, StubWorkshop, sweep_stub
from tiny_models import save_tiny


@pytest.fixture
def asked(tmp_path: Path) -> Tuning:
    rows = tmp_path / "rows.jsonl"
    made = generate_rows(300, seed=0)
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return Tuning(
        model="demo:4m",
        data=str(rows),
        out=tmp_path / "out",
        method="lora",
        rank=16,
        proxy="auto",
        proxy_rank=None,
        device="cpu",
        budget_seconds=None,
        started=time.monotonic(),
    )


def bowl(trial: Trial) -> float:
    """Best at batch size 8, and at 4e-3 on the proxy, two thirds of it on the target."""
    best = 4e-3 if trial.model == "demo:1m" else 4e-3 * 2 / 3
    off = math.log(trial.learning_rate / best) ** 2 + 0.1 * math.log2(trial.batch_size / 8) ** 2
    return 1 + 0.1 * off + 1e-4 * (trial.seed * trial.batch_size % 3)


class Runs:
    """Runs studies with stubs, and notes them."""

    def __init__(self, seconds_per_update: float = 0.0) -> None:
        self.studies: list[LoadedStudy] = []
        self.said: list[str] = []
        self.trained: list[str] = []
        self.seconds_per_update = seconds_per_update

    def __call__(self, loaded: LoadedStudy, out: Path, should_stop: Callable[[], bool]) -> Sweep:
        self.studies.append(loaded)
        stub = StubEngine(
            seconds_per_update=self.seconds_per_update, trained=self.trained, loss=bowl
        )
        workshop = StubWorkshop(loaded, stub)
        return sweep_stub(out, loaded, workshop=workshop, should_stop=should_stop)

    def tune(self, asked: Tuning, should_stop: Callable[[], bool] = lambda: False) -> None:
        tune(asked, run=self, should_stop=should_stop, say=self.said.append)


def test_the_proxy_is_searched_with_all_rows_and_the_target_trained_at_its_batch_size(asked):
    runs = Runs()
    runs.tune(asked)
    proxy, target, refined, beside = (loaded.study for loaded in runs.studies)
    assert (proxy.model, proxy.rank, target.model, target.rank) == (
        ("demo:1m",), (8,), ("demo:4m",), (16,)
    )  # fmt: skip
    assert proxy.data == target.data == beside.data
    assert proxy.data.rows == (None,)
    assert proxy.batch_size == (1, 2, 4, 8, 16, 32)
    (on_proxy,) = api.recommend(asked.out / "proxy")
    # Of 5e-4 and 2e-3 and what was tried beyond them; the parabola finds the 4e-3 between.
    assert (on_proxy.batch_size, on_proxy.learning_rate) == (8, 2e-3)
    assert target.batch_size == refined.batch_size == (8,)
    carried = 4e-3 * 0.5**0.781
    assert target.learning_rates() == pytest.approx(
        [carried / 1.5, carried, 1.5 * carried], rel=0.05
    )
    # The target's best LR is 2.67e-3, between the first two.
    (added,) = set(refined.learning_rates()) - set(target.learning_rates())
    assert added == pytest.approx(4e-3 * 2 / 3, rel=0.03)
    assert (beside.batch_size, beside.learning_rates()) == ((4, 16), (added,))
    (answer,) = api.recommend(asked.out)
    assert (answer.model, answer.evidence.num_trials) == ("demo:4m", on_proxy.evidence.num_trials)
    assert answer.undecided == ()
    assert (answer.batch_size, answer.learning_rate) == (8, added)
    assert sorted({one.batch_size for one in answer.confirmed}) == [4, 8, 16]
    assert answer.cost_fraction is not None
    assert 0 < answer.cost_fraction < 1
    # The same again trains nothing, and ends at the same answer.
    trained = list(runs.trained)
    runs.tune(asked)
    assert runs.trained == trained
    assert api.recommend(asked.out) == (answer,)


def test_a_proxy_gets_fewer_seeds_where_they_decide_whether_the_search_is_cheap():
    shares = (0.001, 0.01, 0.011, 0.02, 0.021, 0.3)
    assert [finest_grid(share) for share in shares] == [0, 0, 1, 1, 0, 0]
    assert PROXY_GRIDS[0][2] > PROXY_GRIDS[1][2]


def test_when_the_budget_is_over_the_answer_is_what_can_be_said(asked):
    runs = Runs(seconds_per_update=0.02)
    asked = replace(asked, budget_seconds=12.0, started=time.monotonic())
    runs.tune(asked)
    assert time.monotonic() - asked.started < 12.0
    (said,) = (said for said in runs.said if "share of the budget is over after" in said)
    assert "the same command with a longer --budget goes on" in said
    (answer,) = api.recommend(asked.out)
    assert answer.undecided
    assert answer.batch_size is None
    # Without an end it takes the finest search, and begins nothing of the coarser one again.
    runs.seconds_per_update = 0.0
    runs.tune(replace(asked, budget_seconds=None))
    sizes = [set(loaded.study.batch_size) for loaded in runs.studies[:2]]
    assert sizes[0] < sizes[1] == {1, 2, 4, 8, 16, 32}
    # But for the one that was under way, which goes on.
    assert len(runs.trained) - len(set(runs.trained)) <= 1
    assert api.recommend(asked.out)[0].confirmed


def test_a_budget_too_short_for_any_search_still_begins_one_that_can_tell_batch_sizes_apart(asked):
    rows = Path(asked.data)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:120]), encoding="utf-8")
    runs = Runs()
    # The coarsest search of so few rows would have batch size 4 alone.
    runs.tune(replace(asked, budget_seconds=1e-3, started=time.monotonic()))
    assert len(runs.studies[0].study.batch_size) > 1


def test_a_stop_is_a_stop_and_no_answer(asked):
    with pytest.raises(Interrupted):
        Runs().tune(asked, should_stop=lambda: True)


def test_without_a_smaller_model_the_target_itself_is_swept(asked):
    for changed in (replace(asked, proxy=None), replace(asked, model="demo:1m")):
        runs = Runs()
        runs.tune(replace(changed, out=asked.out / changed.model[5:]))
        (loaded,) = runs.studies
        assert loaded.study.model == (changed.model,)
        assert len(loaded.study.batch_size) > 1
    assert any("no smaller model is known for demo:1m" in said for said in runs.said)


def test_what_cannot_be_a_proxy_is_refused_before_anything_is_written(asked, tmp_path):
    other = tmp_path / "other"
    save_tiny(other, "llama")
    refused: list[tuple[Tuning, type[LoratuneError], str]] = [
        (replace(asked, model="demo:1m", proxy="demo:4m"), ModelError, "choose a smaller one"),
        (replace(asked, proxy=str(other)), ModelError, "the same tokenizer"),
        (replace(asked, proxy="demo:2m"), ModelError, "is no demo model"),
    ]
    for request, error, message in refused:
        with pytest.raises(error, match=message):
            Runs().tune(request)
        assert not asked.out.exists()
    with pytest.raises(StudyError, match="give a positive time"):
        replace(asked, budget_seconds=0.0)
    with pytest.raises(StudyError, match="proxy rank 32"):
        replace(asked, proxy_rank=32)

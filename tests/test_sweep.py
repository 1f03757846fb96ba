"""The sweep with a stub engine: resume, kills, shared trials, what is kept and what is refused."""

import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stub_sweep
from loratune import training
from loratune.analyse.cells import make_cells
from loratune.analyse.curves import make_curves
from loratune.engine.base import Progress, Snapshot
from loratune.errors import StoreError
from loratune.recommendation.searched import answered
from loratune.records import Answer, Outcome, Said, ScoreKey, Trial, TrialResult
from loratune.store.database import Store, open_store
from loratune.study.loading import LoadedStudy, parse_study
from loratune.sweep import Sweep
from loratune.training import Interrupted
from stub_sweep import (
    STUBS,
    Silent,
    StubEngine,
    StubPack,
    StubWorkshop,
    growing_study,
    searching_study,
    stub_study,
    sweep_stub,
)
from stub_sweep import (
    number as drawn_number,
)

# 2 methods x 2 batch sizes x 2 LRs x 2 seeds
NUM_TRIALS = 16
PROGRAM = Path(__file__).with_name("stub_sweep.py")


@pytest.fixture(params=["one", "pack"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which stub: one that trains trials one after another, or one that trains several at once."""
    return request.param


@pytest.fixture(autouse=True)
def stub(kind: str, monkeypatch: pytest.MonkeyPatch) -> type[StubEngine]:
    """The stub of every workshop that names none."""
    monkeypatch.setattr(StubWorkshop, "kind", kind)
    return STUBS[kind]


def table(sweep: Sweep) -> list[tuple[object, ...]]:
    """What must be equal between two runs of a study: all but times and memory."""
    return [row(result) for result in sweep.results]


def row(result: TrialResult) -> tuple[object, ...]:
    outcome = result.outcome
    assert outcome is not None
    return (
        result.trial.trial_id,
        result.status,
        outcome.num_updates,
        outcome.train_loss,
        outcome.validation_loss,
        outcome.losses,
        outcome.num_tokens,
    )


def test_every_trial_is_trained_once_and_a_second_run_trains_none(tmp_path):
    workshop = StubWorkshop(stub_study())
    first = sweep_stub(tmp_path / "out", workshop=workshop)
    assert len(set(workshop.stub.trained)) == len(workshop.stub.trained) == NUM_TRIALS
    assert first.statuses() == {"done": NUM_TRIALS}
    watcher = Silent()
    second = sweep_stub(tmp_path / "out", workshop=workshop, watcher=watcher)
    assert len(workshop.stub.trained) == NUM_TRIALS
    assert watcher.told == [f"{NUM_TRIALS} of {NUM_TRIALS}"]
    assert table(first) == table(second)


def test_killed_at_twenty_random_moments_the_table_is_that_of_an_undisturbed_run(tmp_path, kind):
    undisturbed = sweep_stub(tmp_path / "undisturbed")
    chance = random.Random(7)
    out = tmp_path / "killed"
    command = [sys.executable, str(PROGRAM), str(out), "0.02", kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path])}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and not (out / "loratune.db").exists():
        time.sleep(0.01)
    startup = time.monotonic() - started
    for _ in range(20):
        # From the middle of the imports to a second into the training.
        time.sleep(chance.uniform(0.3 * startup, startup + 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = subprocess.Popen(command, env=environment)
    assert process.wait(timeout=120) == 0
    killed = sweep_stub(out)
    assert len({result.trial.trial_id for result in killed.results}) == NUM_TRIALS
    assert table(killed) == table(undisturbed)
    assert not list((out / "snapshots").glob("*.safetensors"))


class StopsAfter(Silent):
    """Asks the sweep to stop after a number of updates; notes the trials that are under way."""

    def __init__(self, num_updates: int) -> None:
        super().__init__()
        self.left = num_updates
        self.under_way: set[str] = set()

    def should_stop(self) -> bool:
        return self.left <= 0

    def trial_begins(self, trial: Trial) -> None:
        self.under_way.add(trial.trial_id)

    def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
        self.under_way.remove(trial.trial_id)

    def update(self, trial: Trial, progress: Progress) -> None:
        self.left -= 1


def test_stopping_snapshots_all_under_way_gives_it_back_and_going_on_starts_from_it(tmp_path, kind):
    watcher = StopsAfter(21)
    with pytest.raises(Interrupted):
        sweep_stub(tmp_path, watcher=watcher, should_stop=watcher.should_stop)
    kept = {path.stem for path in (tmp_path / "snapshots").glob("*.safetensors")}
    assert kept == watcher.under_way
    assert len(kept) == (1 if kind == "one" else 5)
    with open_store(tmp_path / "loratune.db", create=False) as store:
        ends = {one.end_kind for name in kept for one in store.attempts(name)}
        assert ends == {"interrupted"}
        assert {result.status for result in store.results("stub")} <= {"planned", "done"}
    again = Updates()
    sweep = sweep_stub(tmp_path, watcher=again)
    # No update is made twice.
    total = sum(result.trial.num_updates for result in sweep.results)
    assert again.num_updates == total - 21 - max(0, -watcher.left)
    assert sweep.statuses() == {"done": NUM_TRIALS}
    assert table(sweep) == table(sweep_stub(tmp_path / "undisturbed"))
    assert not list((tmp_path / "snapshots").glob("*"))


@pytest.mark.parametrize(("first", "then"), [(StubPack, StubEngine), (StubEngine, StubPack)])
def test_what_another_engine_had_under_way_begins_anew_and_it_is_said(tmp_path, first, then):
    loaded = stub_study()
    watcher = StopsAfter(21)
    with pytest.raises(Interrupted):
        sweep_stub(
            tmp_path,
            loaded,
            workshop=StubWorkshop(loaded, first()),
            watcher=watcher,
            should_stop=watcher.should_stop,
        )
    again = Updates()
    sweep = sweep_stub(tmp_path, loaded, workshop=StubWorkshop(loaded, then()), watcher=again)
    assert sweep.statuses() == {"done": NUM_TRIALS}
    lost = [one for one in again.told if f"under way on the {first.name} engine" in one]
    assert len(lost) == len(watcher.under_way)
    total = sum(result.trial.num_updates for result in sweep.results)
    assert total - 21 < again.num_updates <= total
    assert table(sweep) == table(sweep_stub(tmp_path / "undisturbed"))


@pytest.mark.parametrize("kind", ["pack"], indirect=True)
def test_stopping_does_not_wait_for_a_snapshot_that_the_engine_does_not_offer(tmp_path):
    class Withholds(StubPack):
        def train(self, feed):
            for event in super().train(feed):
                if not isinstance(event, Snapshot) or event.trial_id != self.trained[0]:
                    yield event

    loaded = stub_study()
    watcher = StopsAfter(11)
    pack = Withholds()
    with pytest.raises(Interrupted):
        sweep_stub(
            tmp_path,
            loaded,
            workshop=StubWorkshop(loaded, pack),
            watcher=watcher,
            should_stop=watcher.should_stop,
        )
    # The third step had begun, and a fourth let the engine say that it has no more to offer.
    assert watcher.left >= 11 - 21
    kept = {path.stem for path in (tmp_path / "snapshots").glob("*")}
    assert kept == watcher.under_way - {pack.trained[0]}
    assert sweep_stub(tmp_path, loaded).statuses() == {"done": NUM_TRIALS}


class Updates(Silent):
    num_updates = 0

    def update(self, trial: Trial, progress: Progress) -> None:
        self.num_updates += 1


def test_two_studies_that_share_trials_train_them_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = "shared.db"
    small, large = stub_study("small"), stub_study("large", batch_size="[8, 16, 32]")
    first = StubWorkshop(small)
    sweep_stub(tmp_path / "small", small, workshop=first, store=store)
    second = StubWorkshop(large)
    sweep = sweep_stub(tmp_path / "large", large, workshop=second, store=store)
    assert len(first.stub.trained) == NUM_TRIALS
    assert len(second.stub.trained) == NUM_TRIALS // 2
    assert len(sweep.results) == NUM_TRIALS * 3 // 2
    assert sweep.statuses() == {"done": NUM_TRIALS * 3 // 2}
    # And the folders know where their store is, wherever they are read from.
    address = (tmp_path / "small" / "store.txt").read_text().strip()
    assert Path(address) == (tmp_path / "shared.db").resolve()
    assert len(sweep_stub(tmp_path / "small", small).results) == NUM_TRIALS


def test_a_study_that_has_grown_trains_only_what_is_new(tmp_path):
    sweep_stub(tmp_path, stub_study())
    grown = stub_study(batch_size="[4, 8, 16]")
    workshop = StubWorkshop(grown)
    sweep = sweep_stub(tmp_path, grown, workshop=workshop)
    assert len(workshop.stub.trained) == NUM_TRIALS // 2
    assert len(sweep.results) == NUM_TRIALS * 3 // 2


def test_a_failing_trial_is_recorded_with_its_traceback_and_tried_again(tmp_path, stub):
    loaded = stub_study()
    broken = stub(fails=lambda trial: trial.seed == 1 and trial.batch_size == 8)
    sweep = sweep_stub(tmp_path, loaded, workshop=StubWorkshop(loaded, broken))
    assert sweep.statuses() == {"done": NUM_TRIALS - 4, "failed": 4}
    assert sweep.num_failed == 4
    failed = next(result for result in sweep.results if result.status == "failed")
    assert failed.outcome is not None
    assert failed.outcome.reason == "the stub broke"
    assert failed.outcome.error is not None
    assert "RuntimeError: the stub broke" in failed.outcome.error
    mended = StubWorkshop(loaded)
    again = sweep_stub(tmp_path, loaded, workshop=mended)
    assert len(mended.stub.trained) == 4
    assert again.statuses() == {"done": NUM_TRIALS}
    assert table(again) == table(sweep_stub(tmp_path / "whole"))


@pytest.mark.parametrize(("keep", "count"), [("none", 0), ("best", 4), ("all", NUM_TRIALS)])
def test_as_many_adapters_are_kept_as_the_study_says(tmp_path, keep, count):
    loaded = stub_study(more=f"keep_adapters: {keep}")
    sweep = sweep_stub(tmp_path, loaded)
    kept = {path.name for path in (tmp_path / "adapters").glob("*")}
    assert len(kept) == count
    if keep == "best":
        for cell in _cells(sweep):
            losses = {result.trial.trial_id: _loss(result) for result in cell}
            by_rate = dict[float, list[str]]()
            for result in cell:
                by_rate.setdefault(result.trial.learning_rate, []).append(result.trial.trial_id)
            chosen = min(by_rate.values(), key=lambda ids: sum(losses[one] for one in ids))
            assert kept & set(losses) == {min(chosen, key=losses.__getitem__)}


def _loss(result: TrialResult) -> float:
    assert result.outcome is not None
    assert result.outcome.validation_loss is not None
    return result.outcome.validation_loss


def _cells(sweep: Sweep) -> list[list[TrialResult]]:
    cells = dict[tuple[object, ...], list[TrialResult]]()
    for result in sweep.results:
        key = (result.trial.method, result.trial.batch_size)
        cells.setdefault(key, []).append(result)
    return list(cells.values())


def test_selected_means_that_only_the_chosen_learning_rate_meets_the_test(tmp_path):
    loaded = stub_study(more="evaluate: {tasks: [gsm8k], when: selected}")
    workshop = StubWorkshop(loaded)
    sweep = sweep_stub(tmp_path, loaded, workshop=workshop)
    # 4 cells, one LR each, 2 seeds.
    assert len(workshop.scored) == 8
    for cell in _cells(sweep):
        rates = {result.trial.learning_rate for result in cell if result.scores}
        assert len(rates) == 1
    sweep_stub(tmp_path, loaded, workshop=workshop)
    assert len(workshop.scored) == 8


def test_all_means_every_trial_and_validation_accuracy_is_scored_before_selection(tmp_path):
    loaded = stub_study(
        more="select_on: validation_accuracy\nevaluate: {tasks: [gsm8k], when: selected}"
    )
    workshop = StubWorkshop(loaded)
    sweep_stub(tmp_path, loaded, workshop=workshop)
    tasks = [task for _, task in workshop.scored]
    assert tasks.count("validation") == NUM_TRIALS
    assert tasks.count("gsm8k") == 8
    every = stub_study(more="evaluate: {tasks: [gsm8k], when: all}")
    workshop = StubWorkshop(every)
    sweep_stub(tmp_path / "every", every, workshop=workshop)
    assert len(workshop.scored) == NUM_TRIALS


# What is refused, and writes nothing ------------------------------------------------------------


def test_a_folder_of_another_study_is_refused(tmp_path):
    sweep_stub(tmp_path, stub_study("one"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(StoreError, match="holds study 'one', not 'two'"):
        sweep_stub(tmp_path, stub_study("two"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match="is not empty"):
        sweep_stub(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_whose_first_commit_was_cut_off_is_taken_up(tmp_path):
    # What a kill leaves while the tables are being made: the study's file comes after them.
    at_work = sqlite3.connect(tmp_path / "at_work.db", isolation_level=None)
    with closing(at_work):
        at_work.execute("PRAGMA cache_size = 1")  # so that pages are in the file before the commit
        at_work.execute("BEGIN")
        at_work.execute("CREATE TABLE half (text)")
        at_work.execute("INSERT INTO half VALUES (zeroblob(100000))")
        out = tmp_path / "out"
        out.mkdir()
        shutil.copy(tmp_path / "at_work.db", out / "loratune.db")
        shutil.copy(tmp_path / "at_work.db-journal", out / "loratune.db-journal")
    assert (out / "loratune.db").stat().st_size > 0
    assert (out / "loratune.db-journal").stat().st_size > 0
    assert sweep_stub(out).statuses().keys() == {"done"}
    with closing(sqlite3.connect(out / "loratune.db")) as store:
        assert not store.execute("SELECT * FROM sqlite_master WHERE name = 'half'").fetchall()


@pytest.mark.parametrize(
    "name", [".lock", "store.txt.partial", "study.yaml.partial", "proxy.json.partial"]
)
def test_a_folder_that_a_kill_left_before_its_study_was_there_is_taken_up(tmp_path, name):
    (tmp_path / name).write_text("hal")
    assert sweep_stub(tmp_path).statuses().keys() == {"done"}
    assert not (tmp_path / "study.yaml.partial").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        sweep_stub(tmp_path / "out")
    with pytest.raises(StoreError, match="cannot be written"):
        sweep_stub(tmp_path / "out" / "below")


def test_a_folder_in_use_by_another_process_is_refused(tmp_path, kind):
    command = [sys.executable, str(PROGRAM), str(tmp_path), "0.5", kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path])}
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "study.yaml").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(StoreError, match="in use by another loratune process"):
            sweep_stub(tmp_path)
    finally:
        process.kill()
        process.wait()


def test_another_study_of_the_same_name_is_refused_and_the_first_is_left_alone(tmp_path):
    sweep_stub(tmp_path, stub_study())
    before = (tmp_path / "study.yaml").read_text()
    with pytest.raises(StoreError, match="the two share no trial"):
        sweep_stub(tmp_path, stub_study(batch_size="[4, 32]"))
    assert (tmp_path / "study.yaml").read_text() == before


def test_a_refused_request_leaves_no_folder(tmp_path):
    (tmp_path / "no.db").write_text("this is no database, and long enough to be read as one" * 40)
    with pytest.raises(StoreError):
        sweep_stub(tmp_path / "out", store=str(tmp_path / "no.db"))
    assert not (tmp_path / "out").exists()


def test_a_score_that_fails_costs_no_other_trial_and_is_counted(tmp_path):
    class Breaks(StubWorkshop):
        def score_one(self, trial, adapter, *, task):
            if trial.batch_size == 8:
                raise RuntimeError("out of memory")
            return super().score_one(trial, adapter, task=task)

    loaded = stub_study(more="evaluate: {tasks: [gsm8k], when: all}\nkeep_adapters: all")
    sweep = sweep_stub(tmp_path, loaded, workshop=Breaks(loaded))
    assert sweep.statuses() == {"done": NUM_TRIALS}
    assert sweep.num_not_scored == NUM_TRIALS // 2
    again = sweep_stub(tmp_path, loaded)
    assert again.num_not_scored == 0
    assert all(result.scores for result in again.results)


def test_a_study_shows_the_scores_that_it_asks_for_not_those_of_another(tmp_path):
    class Strict(StubWorkshop):
        grader = "strict"

        def asks(self, trial, *, task):
            return ScoreKey(task, "1", self.grader, "greedy")

        def score_one(self, trial, adapter, *, task):
            score, answers = super().score_one(trial, adapter, task=task)
            return replace(score, grader=self.grader), answers

    class Pissa(Strict):
        grader = "pissa"

    more = "evaluate: {tasks: [gsm8k], when: all}\nkeep_adapters: all"
    store = str(tmp_path / "shared.db")
    for name, kind in (("one", Strict), ("two", Pissa), ("one", Strict)):
        loaded = stub_study(name, more=more)
        sweep = sweep_stub(tmp_path / name, loaded, workshop=kind(loaded), store=store)
        graders = {score.grader for result in sweep.results for score in result.scores}
        assert graders == {kind.grader}
        assert sum(len(result.scores) for result in sweep.results) == NUM_TRIALS


# Many at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pack"], indirect=True)
@pytest.mark.parametrize("more", ["", "evaluate: {tasks: [gsm8k], when: all}"])
def test_trials_that_finish_in_any_order_give_the_table_of_one_after_another(tmp_path, more):
    loaded = stub_study(batch_size="[4, 32, 8]", more=more)
    one, pack = StubEngine(), StubPack(seats=7)
    alone = sweep_stub(tmp_path / "one", loaded, workshop=StubWorkshop(loaded, one))
    packed = sweep_stub(tmp_path / "pack", loaded, workshop=StubWorkshop(loaded, pack))
    assert pack.most == 7
    assert one.trained != pack.trained
    assert table(packed) == table(alone)
    assert [result.scores for result in packed.results] == [
        result.scores for result in alone.results
    ]
    kept = [
        sorted(path.name for path in (tmp_path / kind / "adapters").iterdir()) for kind in STUBS
    ]
    assert kept[0] == kept[1]
    assert kept[0]


@pytest.mark.parametrize("kind", ["pack"], indirect=True)
def test_only_the_culprit_fails_when_a_pack_breaks_and_its_neighbours_go_on(tmp_path):
    loaded = stub_study()
    plan = StubWorkshop(loaded).plan()
    culprit = plan.trials[6].trial_id
    pack = StubPack(breaks=lambda trial, update: trial.trial_id == culprit and update >= 2)
    watcher = Updates()
    sweep = sweep_stub(
        tmp_path,
        loaded,
        workshop=StubWorkshop(loaded, pack),
        watcher=watcher,
        snapshot_seconds=0.0,  # after every step: rounds take no time on this clock
        clock=lambda: 0.0,
    )
    assert sweep.statuses() == {"done": NUM_TRIALS - 1, "failed": 1}
    (failed,) = [result for result in sweep.results if result.status == "failed"]
    assert failed.trial.trial_id == culprit
    assert failed.outcome is not None
    assert "RuntimeError: the pack broke" in (failed.outcome.error or "")
    assert any("the engine broke with 5 trials under way" in told for told in watcher.told)
    assert pack.most == 5
    # The five of the broken pack went on from their snapshots, alone, and no update is made twice.
    total = sum(trial.num_updates for trial in plan.trials)
    assert watcher.num_updates == total - plan.trials[6].num_updates + 2
    assert len(pack.trained) == NUM_TRIALS + 5
    # And a second run tries the culprit alone.
    mended = StubWorkshop(loaded, StubPack())
    assert sweep_stub(tmp_path, loaded, workshop=mended).statuses() == {"done": NUM_TRIALS}
    assert mended.stub.trained == [culprit]


@pytest.mark.parametrize("kind", ["pack"], indirect=True)
def test_a_trial_that_breaks_the_engine_before_it_is_claimed_fails_alone(tmp_path):
    class Chokes(StubPack):
        def train(self, feed):
            if any(trial.batch_size == 16 and trial.seed == 1 for trial in feed.waiting()):
                raise RuntimeError("choked")
            yield from super().train(feed)

    loaded = stub_study()
    sweep = sweep_stub(tmp_path, loaded, workshop=StubWorkshop(loaded, Chokes()))
    assert sweep.statuses() == {"done": NUM_TRIALS - 4, "failed": 4}


def test_without_an_engine_for_a_group_its_trials_fail_and_the_others_go_on(tmp_path, kind):
    class NoEngine(StubWorkshop):
        def groups(self, trials):
            return tuple((trial,) for trial in trials)

        def engine(self, group, *, num_processes, remark):
            if group[0].seed == 1:
                raise OSError("the model is gone")
            return self.stub

    loaded = stub_study()
    sweep = sweep_stub(tmp_path, loaded, workshop=NoEngine(loaded))
    assert sweep.statuses() == {"done": NUM_TRIALS // 2, "failed": NUM_TRIALS // 2}
    assert {result.engine for result in sweep.results} == {"none", kind}


def test_a_trial_that_is_taken_over_is_dropped_and_its_neighbours_go_on(
    tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(training, "HEARTBEAT_SECONDS", 0.005)
    loaded = stub_study()

    class Thief(Silent):
        stolen: str | None = None

        def update(self, trial: Trial, progress: Progress) -> None:
            if self.stolen is None and progress.update == 1:
                self.stolen = trial.trial_id
                with open_store(tmp_path / "loratune.db", create=False) as store:
                    store.release(store.attempts(trial.trial_id)[-1].attempt_id)

    thief = Thief()
    slow = STUBS[kind](seconds_per_update=0.02)
    sweep = sweep_stub(tmp_path, loaded, workshop=StubWorkshop(loaded, slow), watcher=thief)
    assert sweep.statuses() == {"done": NUM_TRIALS - 1, "planned": 1}
    assert sweep.num_unfinished == 1
    assert [told for told in thief.told if "taken over" in told] == [
        f"{thief.stolen} was taken over by another process; dropped"
    ]
    assert sweep_stub(tmp_path, loaded).statuses() == {"done": NUM_TRIALS}


def test_a_trial_that_another_process_trains_is_passed(tmp_path, monkeypatch):
    claim = Store.claim
    taken: list[str] = []

    def claim_late(store, trial_id, **options):
        if not taken:
            taken.append(trial_id)
            return None
        return claim(store, trial_id, **options)

    monkeypatch.setattr(Store, "claim", claim_late)
    watcher = Silent()
    sweep = sweep_stub(tmp_path, watcher=watcher)
    assert sweep.statuses() == {"done": NUM_TRIALS - 1, "planned": 1}
    assert f"{taken[0]} is being trained by another process; passed" in watcher.told


def test_a_snapshot_that_cannot_be_written_costs_its_trial_alone(tmp_path):
    class Full(StubWorkshop):
        refused: str | None = None

        def save_snapshot(self, path, snapshot):
            self.refused = self.refused or snapshot.trial_id
            if snapshot.trial_id == self.refused:
                raise OSError("no space left on device")
            super().save_snapshot(path, snapshot)

    loaded = stub_study()
    workshop = Full(loaded)
    sweep = sweep_stub(tmp_path, loaded, workshop=workshop, snapshot_seconds=0.0)
    assert sweep.statuses() == {"done": NUM_TRIALS - 1, "failed": 1}
    (failed,) = [result for result in sweep.results if result.status == "failed"]
    assert failed.trial.trial_id == workshop.refused


def test_rounds_of_snapshots_cost_a_twentieth_of_the_time(tmp_path):
    now = 0.0

    class Slow(StubWorkshop):
        def save_snapshot(self, path, snapshot):
            nonlocal now
            now += 3.0
            saved.append(now)
            super().save_snapshot(path, snapshot)

    class Clocked(Silent):
        def update(self, trial: Trial, progress: Progress) -> None:
            nonlocal now
            now += 1.0

    saved: list[float] = []
    loaded = stub_study(batch_size="1")  # 64 updates a trial
    workshop = Slow(loaded)
    sweep_stub(
        tmp_path, loaded, workshop=workshop, watcher=Clocked(), snapshot_seconds=5.0,
        clock=lambda: now,
    )  # fmt: skip
    assert len(saved) >= 8
    assert 3.0 * len(saved) <= 0.06 * now + 3.0 * workshop.stub.num_at_once * 2


def test_cells_without_scores_drop_adapters_while_the_engine_is_at_work(tmp_path):
    class Counts(Silent):
        most = 0

        def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
            self.most = max(self.most, len(list((tmp_path / "adapters").iterdir())))

    watcher = Counts()
    sweep_stub(tmp_path, stub_study(batch_size="[8, 16, 32]"), watcher=watcher)
    # 6 cells of 4 trials: those that stand, and those of the cells under way.
    assert watcher.most < 24
    assert len(list((tmp_path / "adapters").iterdir())) == 6


def test_what_outcomes_call_for_is_trained_once_and_every_best_rate_is_inside_or_at_a_limit(
    tmp_path,
):
    loaded = growing_study()
    workshop, watcher = StubWorkshop(loaded), Silent()
    sweep = sweep_stub(tmp_path / "out", loaded, workshop=workshop, watcher=watcher)
    trained = workshop.stub.trained
    assert len(set(trained)) == len(trained) == len(sweep.results)
    assert sweep.statuses() == {"done": len(trained)}
    told = [one for one in watcher.told if one.endswith(" more")]
    assert sum(int(one.split()[0]) for one in told) == len(trained) - 8
    cells = make_cells(sweep.results)
    assert len(cells) == 4
    for cell in cells:
        assert cell.best is not None
        assert cell.seeds == (0, 1, 2)
        rates = [rate.learning_rate for rate in cell.rates]
        below, above = sum(rate < 1e-3 for rate in rates), sum(rate > 1e-2 for rate in rates)
        assert below <= 2
        assert above <= 2
        assert not cell.lr_at_edge or below == 2 or above == 2
    # The best cell of each method, and no other, has fresh seeds.
    confirmed = [[one.trial.seed for one in cell.confirmations] for cell in cells]
    for one, other in (cells[:2], cells[2:]):
        assert one.score is not None
        assert other.score is not None
        assert confirmed[cells.index(one)] == (
            [3, 4] if one.score.value < other.score.value else []
        )
    again = StubWorkshop(loaded)
    assert table(sweep_stub(tmp_path / "out", loaded, workshop=again)) == table(sweep)
    assert again.stub.trained == []


def assert_stopped_anywhere_ends_alike(
    folder: Path,
    loaded: LoadedStudy,
    undisturbed: Sweep,
    *,
    parts: int,
    sweep: Callable[..., Sweep] = sweep_stub,
) -> None:
    """Stop a study early and then every so many parts of its updates, and go on each time."""
    total = sum(one.outcome.num_updates for one in undisturbed.results if one.outcome)
    for number, num_updates in enumerate(range(7, total, total // parts)):
        out = folder / str(number)
        watcher = StopsAfter(num_updates)
        with pytest.raises(Interrupted):
            sweep(out, loaded, watcher=watcher, should_stop=watcher.should_stop)
        assert sorted(table(sweep(out, loaded))) == sorted(table(undisturbed))


def test_stopped_anywhere_a_growing_study_ends_like_an_undisturbed_one(tmp_path):
    loaded = growing_study()
    undisturbed = sweep_stub(tmp_path / "undisturbed", loaded)
    assert_stopped_anywhere_ends_alike(tmp_path, loaded, undisturbed, parts=6)


def test_an_adaptive_study_trains_each_trial_once_and_no_more_than_it_may(tmp_path):
    loaded = searching_study()
    workshop = StubWorkshop(loaded)
    sweep = sweep_stub(tmp_path / "out", loaded, workshop=workshop)
    trained = workshop.stub.trained
    assert len(set(trained)) == len(trained) == len(sweep.results)
    differ = list[bool]()
    for method in ("lora", "pissa"):
        own = [one for one in sweep.results if one.trial.method.name == method]
        searched = [one for one in own if one.purpose == "adaptive"]
        # The stub's losses are noise of 30% or so: no answer is good enough before the budget ends.
        assert len(searched) == 13
        assert all(1e-4 <= one.trial.learning_rate <= 1e-2 for one in searched)
        assert {one.trial.seed for one in searched} <= {0, 1, 2}
        assert [one.trial.seed for one in own if one.purpose == "confirm"] == [3, 4]
        # What is confirmed and kept is what is recommended.
        (curve,) = make_curves(answered(own))
        (raw,) = make_curves(make_cells(own))
        assert curve.best is not None
        assert raw.best is not None
        point = (curve.best.batch_size, curve.best.learning_rate)
        differ.append(point != (raw.best.batch_size, raw.best.learning_rate))
        confirmed = {
            (one.trial.batch_size, one.trial.learning_rate)
            for one in own
            if one.purpose == "confirm"
        }
        assert confirmed == {point}
        of_answer = {
            one.trial.trial_id
            for one in searched
            if (one.trial.batch_size, one.trial.learning_rate) == point
        }
        assert of_answer & {one.name for one in (tmp_path / "out" / "adapters").iterdir()}
    assert any(differ), "else nothing is shown"
    assert all(cell.lr_at_edge is None for cell in make_cells(sweep.results))
    kept = list((tmp_path / "out" / "adapters").iterdir())
    known = [cell for cell in answered(sweep.results) if cell.best is not None]
    assert len(kept) == len(known) >= 3  # the best of every cell in which it is known
    again = StubWorkshop(loaded)
    sweep_stub(tmp_path / "out", loaded, workshop=again)
    assert again.stub.trained == []


def test_stopped_anywhere_an_adaptive_study_ends_like_an_undisturbed_one(tmp_path):
    loaded = searching_study()
    undisturbed = sweep_stub(tmp_path / "undisturbed", loaded)
    assert_stopped_anywhere_ends_alike(tmp_path, loaded, undisturbed, parts=5)


def flat(trial: Trial) -> float:
    """Ever worse with the learning rate: half of what a search tries is hopeless."""
    return 1.0 + 3.0 * math.log10(trial.learning_rate / 1e-4) + drawn_number(trial, "seed") * 1e-3


@pytest.fixture
def sweep_flat(monkeypatch, stub):
    """`sweep_stub` with a stub whose training losses are its validation loss throughout."""
    monkeypatch.setattr(stub_sweep, "stub_loss_at", lambda trial, update: flat(trial))

    def sweep(out: Path, loaded: LoadedStudy, **options: Any) -> Sweep:
        workshop = StubWorkshop(loaded, stub(loss=flat))
        return sweep_stub(out, loaded, workshop=workshop, **options)

    return sweep


def test_hopeless_trials_of_a_search_stop_half_way_and_the_same_ones_wherever_it_is_interrupted(
    tmp_path, sweep_flat
):
    loaded = searching_study()
    undisturbed = sweep_flat(tmp_path / "undisturbed", loaded)
    halted = [one for one in undisturbed.results if one.status == "stopped"]
    assert halted
    assert all(one.purpose == "adaptive" for one in halted)
    for one in halted:
        assert one.outcome is not None
        assert one.outcome.num_updates == math.ceil(one.trial.num_updates / 2)
    # The first design is trained to its end: a trial of each batch size, and one more at least.
    statuses = [one.status for one in undisturbed.results if one.purpose == "adaptive"]
    assert statuses.index("stopped") >= 3
    assert_stopped_anywhere_ends_alike(tmp_path, loaded, undisturbed, parts=4, sweep=sweep_flat)
    # Switched off, all are trained to their ends.
    text = loaded.text.replace("trials_per_round: 3", "trials_per_round: 3, early_stopping: false")
    whole = sweep_flat(tmp_path / "whole", parse_study(text, name="s.yaml", folder=Path.cwd()))
    assert "stopped" not in whole.statuses()


def test_another_study_trains_to_the_end_what_a_search_had_stopped(tmp_path, sweep_flat):
    store = str(tmp_path / "shared.db")
    searching = searching_study()
    searched = sweep_flat(tmp_path / "search", searching, store=store)
    halted = next(one.trial for one in searched.results if one.status == "stopped")
    grid = stub_study("grid", batch_size=f"[{halted.batch_size}]")
    text = grid.text.replace("[1e-3, 1e-2]", f"[{halted.learning_rate!r}]")
    text = text.replace("seeds: 2", f"seeds: [{halted.seed}]")
    again = sweep_flat(
        tmp_path / "grid", parse_study(text, name="grid.yaml", folder=Path.cwd()), store=store
    )
    (same,) = [one for one in again.results if one.trial.trial_id == halted.trial_id]
    assert same.status == "done"
    assert same.outcome is not None
    assert same.outcome.num_updates == halted.num_updates


def test_a_trial_that_fails_does_not_end_an_adaptive_search(tmp_path, stub):
    loaded = searching_study()
    workshop = StubWorkshop(loaded, stub(fails=lambda trial: trial.batch_size == 8))
    sweep = sweep_stub(tmp_path, loaded, workshop=workshop)
    done = [one for one in sweep.results if one.status == "done" and one.purpose == "adaptive"]
    assert sweep.num_failed > 0
    assert len(done) > 6
    assert {one.trial.batch_size for one in done} == {16}


def test_fresh_seeds_are_scored_and_their_adapters_go(tmp_path):
    loaded = growing_study("evaluate: {tasks: [gsm8k]}")
    sweep = sweep_stub(tmp_path, loaded)
    cells = make_cells(sweep.results)
    fresh = [one for cell in cells for one in cell.confirmations]
    assert len(fresh) == 4
    assert all(len(one.scores) == 1 for one in fresh)
    kept = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert len(kept) == 4  # the best seed's of every cell
    assert kept.isdisjoint(one.trial.trial_id for one in fresh)


@pytest.mark.parametrize("kind", ["pack"], indirect=True)
def test_adapters_that_will_be_neither_scored_nor_kept_go_before_the_pack_has_ended(tmp_path):
    loaded = stub_study(batch_size="[2, 4, 8, 16]", more="evaluate: {tasks: [gsm8k]}")

    class Counts(Silent):
        most = 0

        def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
            there = len(list((tmp_path / "adapters").iterdir()))
            self.most = max(self.most, there)

    watcher = Counts()
    workshop = StubWorkshop(loaded)
    sweep = sweep_stub(tmp_path, loaded, workshop=workshop, watcher=watcher)
    # 8 cells of 2 LRs x 2 seeds: the chosen LR's two, and the cells that are under way.
    assert len(sweep.results) == 32
    assert watcher.most <= 8 * 2 + 5 + 4
    assert len(workshop.scored) == 16  # each cell's chosen LR, both seeds
    assert len(list((tmp_path / "adapters").iterdir())) == 8


@pytest.mark.parametrize("kind", ["pack"], indirect=True)
@pytest.mark.parametrize("when", ["all", "selected"])
def test_the_adapters_of_all_cells_are_scored_together(tmp_path, when):
    loaded = stub_study(more=f"evaluate: {{tasks: [gsm8k, svamp], when: {when}}}")
    workshop = StubWorkshop(loaded, StubPack(seats=7))
    sweep = sweep_stub(tmp_path, loaded, workshop=workshop)
    num_scored = sum(len(result.scores) for result in sweep.results)
    assert num_scored == 2 * NUM_TRIALS // (1 if when == "all" else 2)
    assert workshop.at_once == [num_scored]


def test_scoring_can_be_stopped_between_answers_and_leaves_them_in_the_store(tmp_path):
    said = list[int]()

    class Slow(StubWorkshop):
        def score(self, wanted, *, remark):
            for index, one in enumerate(wanted):
                assert not one.kept
                for number in range(10):
                    said.append(number)
                    yield Said(index, {number: Answer("an answer", 2, True)})
            raise AssertionError("it was to be stopped before")

    class Later(StubWorkshop):
        def score(self, wanted, *, remark):
            kept.extend(len(one.kept) for one in wanted)
            yield from super().score(wanted, remark=remark)

    loaded = stub_study(more="evaluate: {tasks: [gsm8k], when: all}")
    with pytest.raises(Interrupted):
        sweep_stub(tmp_path, loaded, workshop=Slow(loaded), should_stop=lambda: len(said) == 14)
    kept = list[int]()
    sweep = sweep_stub(tmp_path, loaded, workshop=Later(loaded))
    assert [count for count in kept if count] == [10, 4]
    assert sum(len(result.scores) for result in sweep.results) == NUM_TRIALS

"""The sweep with a stub engine: resume, kills, shared trials, what is kept and what is refused."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from loratune.errors import StoreError
from loratune.records import ScoreKey, TrialResult
from loratune.sweep import Interrupted, Sweep
from stub_sweep import Silent, StubEngine, StubWorkshop, stub_study, sweep_stub

# 2 methods x 2 batch sizes x 2 LRs x 2 seeds
NUM_TRIALS = 16
PROGRAM = Path(__file__).with_name("stub_sweep.py")


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


def test_killed_at_twenty_random_moments_the_table_is_that_of_an_undisturbed_run(tmp_path):
    undisturbed = sweep_stub(tmp_path / "undisturbed")
    chance = random.Random(7)
    out = tmp_path / "killed"
    command = [sys.executable, str(PROGRAM), str(out), "0.02"]
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


def test_stopping_keeps_a_snapshot_and_going_on_starts_from_it(tmp_path):
    asked = iter([False] * 30 + [True] * 1000)
    with pytest.raises(Interrupted):
        sweep_stub(tmp_path, should_stop=lambda: next(asked))
    assert len(list((tmp_path / "snapshots").glob("*.safetensors"))) == 1
    sweep = sweep_stub(tmp_path)
    assert sweep.statuses() == {"done": NUM_TRIALS}
    assert not list((tmp_path / "snapshots").glob("*"))


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


def test_a_failing_trial_is_recorded_with_its_traceback_and_tried_again(tmp_path):
    loaded = stub_study()
    broken = StubEngine(fails=lambda trial: trial.seed == 1 and trial.batch_size == 8)
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


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        sweep_stub(tmp_path / "out")
    with pytest.raises(StoreError, match="cannot be written"):
        sweep_stub(tmp_path / "out" / "below")


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    command = [sys.executable, str(PROGRAM), str(tmp_path), "0.5"]
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
        def score(self, trial, adapter, *, task):
            if trial.batch_size == 8:
                raise RuntimeError("out of memory")
            return super().score(trial, adapter, task=task)

    loaded = stub_study(more="evaluate: {tasks: [gsm8k], when: all}\nkeep_adapters: all")
    sweep = sweep_stub(tmp_path, loaded, workshop=Breaks(loaded))
    assert sweep.statuses() == {"done": NUM_TRIALS}
    assert sweep.num_not_scored >= NUM_TRIALS // 2
    again = sweep_stub(tmp_path, loaded)
    assert again.num_not_scored == 0
    assert all(result.scores for result in again.results)


def test_a_study_shows_the_scores_that_it_asks_for_not_those_of_another(tmp_path):
    class Strict(StubWorkshop):
        grader = "strict"

        def asks(self, trial, *, task):
            return ScoreKey(task, "1", self.grader, "greedy")

        def score(self, trial, adapter, *, task):
            score, answers = super().score(trial, adapter, task=task)
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

"""Several processes over one store, with stub engines: shared work, kills, stops, takeovers."""

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from loratune.crew import CrewMember
from loratune.engine.base import Progress
from loratune.records import Outcome, Trial
from loratune.store.database import open_store
from loratune.sweep import Sweep
from loratune.training import Interrupted
from stub_sweep import (
    Silent,
    StubEngine,
    StubPack,
    StubWorkshop,
    growing_study,
    make_stub,
    stub_crew,
    stub_study,
    sweep_stub,
)
from test_sweep import NUM_TRIALS, PROGRAM, table


class Notes(Silent):
    """Notes what it is told of trials; may stop the sweep or kill a process after some updates."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        super().__init__()
        self.num_updates = 0
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.stop_after = stop_after

    def should_stop(self) -> bool:
        return self.stop_after is not None and self.num_updates >= self.stop_after

    def trial_begins(self, trial: Trial) -> None:
        self.begun.append(trial.trial_id)

    def update(self, trial: Trial, progress: Progress) -> None:
        self.num_updates += 1

    def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
        self.ended.append(trial.trial_id)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep_stub(tmp_path_factory.mktemp("undisturbed"))


def pids_of(out: Path, sweep: Sweep) -> set[int]:
    """The processes that trained."""
    with open_store(out / "loratune.db", create=False) as store:
        attempts = [store.attempts(result.trial.trial_id) for result in sweep.results]
    return {attempt.provenance.pid for tried in attempts for attempt in tried}


@pytest.mark.parametrize("kind", [StubEngine, StubPack])
def test_two_processes_train_each_trial_once_between_them(tmp_path, undisturbed, kind):
    loaded = stub_study()
    notes = Notes()
    parents = StubWorkshop(loaded)
    sweep = sweep_stub(
        tmp_path,
        loaded,
        workshop=parents,
        watcher=notes,
        crew=stub_crew(loaded, *[kind(seconds_per_update=0.05)] * 2),
    )
    assert table(sweep) == table(undisturbed)
    assert parents.stub.trained == []
    assert sorted(notes.begun) == sorted(notes.ended)
    assert len(set(notes.ended)) == len(notes.ended) == NUM_TRIALS
    assert notes.num_updates == sum(result.trial.num_updates for result in sweep.results)
    # That a process finds a trial taken is no news here.
    assert notes.told == [f"0 of {NUM_TRIALS}"]
    pids = pids_of(tmp_path, sweep)
    assert len(pids) == 2
    assert os.getpid() not in pids
    # Each cell kept its best adapter.
    assert len(list((tmp_path / "adapters").iterdir())) == 4


@dataclass
class ComesLate:
    """What makes the workshop of a process that begins half a second after the other."""

    make: Callable[[], Any]
    out: Path

    def __call__(self) -> StubWorkshop:
        with open_store(self.out / "loratune.db", create=False) as store:
            while not store.newest_attempt():
                time.sleep(0.05)
        time.sleep(0.5)
        return self.make()


def test_no_process_takes_all_trials_though_it_has_room_for_them_and_comes_first(tmp_path):
    loaded = stub_study()
    stub = StubPack(seats=2 * NUM_TRIALS, seconds_per_update=0.3)
    first, second = stub_crew(loaded, stub, stub)
    late = CrewMember(second.name, ComesLate(second.make_workshop, tmp_path))
    sweep = sweep_stub(tmp_path, loaded, crew=[first, late])
    assert sweep.statuses() == {"done": NUM_TRIALS}
    spans = defaultdict[int, list[Any]](list)
    with open_store(tmp_path / "loratune.db", create=False) as store:
        for result in sweep.results:
            (attempt,) = store.attempts(result.trial.trial_id)
            spans[attempt.provenance.pid].append(attempt)
    assert len(spans) == 2
    for attempts in spans.values():
        together = [
            sum(one.started_at <= other.started_at < one.ended_at for one in attempts)
            for other in attempts
        ]
        assert max(together) <= NUM_TRIALS / 2


def test_a_process_whose_fellow_is_gone_trains_everything_in_the_end(tmp_path):
    loaded = stub_study()
    crew = stub_crew(loaded, StubPack(seats=NUM_TRIALS))
    gone = CrewMember("gone", no_workshop)
    sweep = sweep_stub(tmp_path, loaded, crew=[*crew, gone])
    assert sweep.statuses() == {"done": NUM_TRIALS}


def test_what_outcomes_call_for_is_trained_by_the_processes_too(tmp_path):
    loaded = growing_study()
    alone = sweep_stub(tmp_path / "alone", loaded, workshop=make_stub(loaded, StubPack()))
    parents = StubWorkshop(loaded)
    crew = stub_crew(loaded, StubPack(), StubPack())
    sweep = sweep_stub(tmp_path / "crew", loaded, workshop=parents, crew=crew)
    assert parents.stub.trained == []
    assert len(sweep.results) > 8
    assert sorted(table(sweep)) == sorted(table(alone))


def test_scores_are_made_once_when_the_processes_have_ended(tmp_path):
    loaded = stub_study(more="evaluate: {tasks: [gsm8k], when: selected}")
    parents = StubWorkshop(loaded)
    crew = stub_crew(loaded, StubPack(), StubPack())
    sweep = sweep_stub(tmp_path, loaded, workshop=parents, crew=crew)
    assert len(parents.scored) == len(set(parents.scored)) == 8
    again = sweep_stub(tmp_path, loaded, workshop=parents, crew=crew)
    assert len(parents.scored) == 8
    assert again.results == sweep.results


def test_what_a_killed_process_had_begun_is_taken_over(tmp_path, undisturbed):
    class Kills(Notes):
        def update(self, trial: Trial, progress: Progress) -> None:
            super().update(trial, progress)
            if self.num_updates == 20:
                with open_store(tmp_path / "loratune.db", create=False) as store:
                    os.kill(store.attempts(trial.trial_id)[-1].provenance.pid, signal.SIGKILL)

    loaded = stub_study()
    watcher = Kills()
    crew = stub_crew(loaded, *[StubPack(seconds_per_update=0.1)] * 2)
    sweep = sweep_stub(tmp_path, loaded, watcher=watcher, crew=crew)
    assert table(sweep) == table(undisturbed)
    assert any("ended early (killed by signal 9)" in told for told in watcher.told)
    assert len(set(watcher.begun)) == NUM_TRIALS < len(watcher.begun)


@dataclass(frozen=True)
class KillsItsProcess:
    """What a stub asks before an update: there is no answer, where it is that trial."""

    trial_id: str

    def __call__(self, trial: Trial, update: int = 0) -> bool:
        if trial.trial_id == self.trial_id:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


@pytest.mark.parametrize("kind", [StubEngine, StubPack])
def test_a_trial_that_kills_every_process_costs_no_other_and_no_endless_rounds(tmp_path, kind):
    loaded = stub_study()
    kills = KillsItsProcess(StubWorkshop(loaded).plan().trials[3].trial_id)
    watcher = Notes()
    stub = StubPack(breaks=kills) if kind is StubPack else StubEngine(fails=kills)
    sweep = sweep_stub(tmp_path, loaded, watcher=watcher, crew=stub_crew(loaded, stub, stub))
    assert sweep.statuses() == {"done": NUM_TRIALS - 1, "planned": 1}
    assert sweep.num_unfinished == 1
    assert f"{kills.trial_id} ended 2 processes; given up until the next run" in watcher.told
    assert sweep_stub(tmp_path, loaded).statuses() == {"done": NUM_TRIALS}


def test_a_stop_reaches_every_process_and_nothing_stays_claimed(tmp_path, undisturbed):
    loaded = stub_study()
    notes = Notes(stop_after=25)
    crew = stub_crew(loaded, *[StubPack(seconds_per_update=0.1)] * 2)
    with pytest.raises(Interrupted):
        sweep_stub(tmp_path, loaded, watcher=notes, should_stop=notes.should_stop, crew=crew)
    with open_store(tmp_path / "loratune.db", create=False) as store:
        results = store.results("stub")
        assert {result.status for result in results} <= {"done", "planned"}
        open_ones = [
            attempt
            for result in results
            for attempt in store.attempts(result.trial.trial_id)
            if attempt.ended_at is None
        ]
    assert open_ones == []
    under_way = set(notes.begun) - set(notes.ended)
    assert {path.stem for path in (tmp_path / "snapshots").iterdir()} == under_way
    again = Notes()
    sweep = sweep_stub(tmp_path, loaded, workshop=make_stub(loaded, StubPack()), watcher=again)
    assert table(sweep) == table(undisturbed)
    # No update was lost. (Those of the very end may not have been reported.)
    total = sum(result.trial.num_updates for result in sweep.results)
    assert again.num_updates + notes.num_updates <= total


def test_processes_whose_parent_was_killed_stop_with_snapshots(tmp_path, undisturbed):
    command = [sys.executable, str(PROGRAM), str(tmp_path), "0.2", "pack", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path])}
    parent = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("snapshots/*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        children = psutil.Process(parent.pid).children()
    finally:
        parent.kill()
        parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert len(gone) >= 2
    assert not alive
    assert list(tmp_path.glob("snapshots/*.safetensors"))
    sweep = sweep_stub(tmp_path)
    assert table(sweep) == table(undisturbed)


def test_what_fails_with_one_process_is_recorded_once_and_tried_by_the_next_sweep(tmp_path):
    loaded = stub_study()
    crew = stub_crew(loaded, StubPack(fails=seed_one), StubEngine(fails=seed_one))
    sweep = sweep_stub(tmp_path, loaded, crew=crew)
    assert sweep.statuses() == {"done": NUM_TRIALS // 2, "failed": NUM_TRIALS // 2}
    with open_store(tmp_path / "loratune.db", create=False) as store:
        # Once in each sweep: what failed with one process is not tried by the other.
        assert {len(store.attempts(result.trial.trial_id)) for result in sweep.results} == {1}
        sweep_stub(tmp_path, loaded, crew=crew)
        tried = [len(store.attempts(result.trial.trial_id)) for result in sweep.results]
    assert sorted(tried) == [1] * (NUM_TRIALS // 2) + [2] * (NUM_TRIALS // 2)


def seed_one(trial: Trial) -> bool:
    return trial.seed == 1


def test_processes_without_a_workshop_say_why_and_the_sweep_ends(tmp_path):
    loaded = stub_study()
    crew = [CrewMember(name, no_workshop) for name in ("one", "two")]
    notes = Notes()
    sweep = sweep_stub(tmp_path, loaded, watcher=notes, crew=crew)
    assert sweep.num_unfinished == NUM_TRIALS
    assert any("no such device" in told for told in notes.told)
    assert any("ended early (code 1)" in told for told in notes.told)


def no_workshop() -> StubWorkshop:
    raise RuntimeError("no such device")

"""The loop: plan, engine, evaluation and store meet here and nowhere else. Resume lives here.

Crash-only: what is finished is in the store, in one transaction; what is under way is in a snapshot
of at most `snapshot_seconds` ago; the rest is planned again from the study. Running a study and
going on with it are the same call. A trial that fails is recorded with its traceback and the others
go on; one that diverges costs only itself.

No torch is imported here: engines come from a `Workshop`, so that a sweep can be tested, and its
results read, without one.
"""

import shutil
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loratune.analyse.cells import Cell, make_cells
from loratune.engine.base import Engine, Failed, Finished, Progress, Snapshot, Work
from loratune.errors import StoreError
from loratune.folder import ResultsFolder, replace_folder, working_folder
from loratune.planning.build import Plan
from loratune.records import (
    FINAL_STATUSES,
    DataSummary,
    Outcome,
    Prediction,
    Provenance,
    Score,
    ScoreKey,
    Trial,
    TrialResult,
)
from loratune.store.database import Store
from loratune.study.identity import cell_key
from loratune.study.loading import LoadedStudy
from loratune.study.schema import VALIDATION, Study

if TYPE_CHECKING:
    from loratune.methods.adapter_files import AdapterFiles

SNAPSHOT_SECONDS = 120.0
HEARTBEAT_SECONDS = 15.0


class Interrupted(Exception):
    """Not an error: the sweep stopped because it was asked to. The folder can be gone on with."""


class Workshop(Protocol):
    """What a sweep needs of models, data and devices: made for one study."""

    def plan(self) -> Plan:
        """The study's plan from the real models and data; nothing provisional in it."""
        ...

    def data_summaries(self) -> Mapping[str, DataSummary]:
        """What became of the rows, by data fingerprint."""
        ...

    def remarks(self) -> tuple[str, ...]:
        """What the user should know of models and data before training, in plain words."""
        ...

    def provenance(self) -> Provenance:
        """How trials are run here."""
        ...

    def engine(self, trial: Trial) -> Engine:
        """An engine that holds the trial's base model."""
        ...

    def asks(self, trial: Trial, *, task: str) -> ScoreKey:
        """What `score` would ask now, and how it would judge."""
        ...

    def score(
        self, trial: Trial, adapter: Path, *, task: str
    ) -> tuple[Score, tuple[Prediction, ...]]:
        """One task's score of a saved adapter."""
        ...

    def load_snapshot(self, path: Path) -> Snapshot | None:
        """A snapshot from a file; None where it is no whole one."""
        ...

    def save_snapshot(self, path: Path, snapshot: Snapshot) -> None:
        """A snapshot to a file, whole or not at all."""
        ...


class Watcher(Protocol):
    """Somebody who watches a sweep: a progress bar, a log, a test."""

    def begins(self, plan: Plan, *, finished: frozenset[str]) -> None:
        """The sweep begins; the trials of these ids stand already."""
        ...

    def trial_begins(self, trial: Trial) -> None:
        """A trial is about to be trained."""
        ...

    def update(self, trial: Trial, progress: Progress) -> None:
        """An update is done."""
        ...

    def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
        """A trial's outcome is in the store."""
        ...

    def scored(self, trial: Trial, score: Score) -> None:
        """A score is in the store."""
        ...

    def remarks(self, text: str) -> None:
        """Something that the user should know."""
        ...


@dataclass(frozen=True)
class Sweep:
    """What a sweep left: the folder, and every trial's result in the study's order."""

    folder: ResultsFolder
    results: tuple[TrialResult, ...]
    num_not_scored: int

    def statuses(self) -> dict[str, int]:
        """How many trials have each status that occurs."""
        return dict(Counter(result.status for result in self.results))

    @property
    def num_failed(self) -> int:
        """Trials that failed or did not fit into memory."""
        return sum(result.status in ("failed", "out_of_memory") for result in self.results)

    @property
    def num_unfinished(self) -> int:
        """Trials without an outcome: another process holds them."""
        return sum(result.status in ("planned", "running") for result in self.results)


def run_sweep(
    loaded: LoadedStudy,
    *,
    out: str | Path,
    workshop: Workshop,
    watcher: Watcher,
    store: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    snapshot_seconds: float = SNAPSHOT_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Sweep:
    """Train what is not trained yet, score what is not scored yet, keep what is to be kept.

    Args:
        loaded: the study.
        out: the results folder; made where it is missing, gone on with where it is this study's.
        store: address of a store outside the folder, shared with other studies.
        should_stop: asked after every update; True ends the sweep with a snapshot.

    Raises:
        Interrupted: `should_stop` said so. The folder is whole and can be gone on with.
        LoratuneError: the request is wrong; nothing was written.
    """
    plan = workshop.plan()
    assert not plan.provisional, "a sweep trains on real models and data"
    study = loaded.study
    asks = {workshop.asks(one, task=task) for one in plan.trials for task in study.scored_tasks()}
    ids = frozenset(trial.trial_id for trial in plan.trials)
    with working_folder(out, loaded, store=store, trial_ids=ids) as (folder, opened):
        opened.add_study(
            study.study,
            text=loaded.text,
            select_on=study.select_on,
            trials=plan.trials,
            asks=tuple(asks),
        )
        for fingerprint, summary in workshop.data_summaries().items():
            opened.add_data_summary(fingerprint, summary)
        loop = _Loop(
            study=study,
            folder=folder,
            store=opened,
            workshop=workshop,
            watcher=watcher,
            should_stop=should_stop,
            snapshot_seconds=snapshot_seconds,
            clock=clock,
        )
        loop.run(plan)
        return Sweep(
            folder=folder,
            results=opened.results(study.study),
            num_not_scored=loop.num_not_scored,
        )


@dataclass
class _Loop:
    study: Study
    folder: ResultsFolder
    store: Store
    workshop: Workshop
    watcher: Watcher
    should_stop: Callable[[], bool]
    snapshot_seconds: float
    clock: Callable[[], float]
    num_not_scored: int = 0

    def run(self, plan: Plan) -> None:
        """Cell by cell: train its trials, score the chosen ones, drop the other adapters."""
        finished = frozenset(
            result.trial.trial_id for result in self._results() if result.status in FINAL_STATUSES
        )
        self.watcher.begins(plan, finished=finished)
        for remark in self.workshop.remarks():
            self.watcher.remarks(remark)
        # The plan keeps a cell's trials together.
        for _, cell in groupby(plan.trials, key=cell_key):
            trials = tuple(cell)
            for trial in trials:
                if trial.trial_id not in finished:
                    self._train(trial)
            self._settle(trials)

    # Training -----------------------------------------------------------------------------------

    def _train(self, trial: Trial) -> None:
        self._stop_if_asked()
        attempt = self.store.claim(trial.trial_id, provenance=self.workshop.provenance())
        if attempt is None:
            self.watcher.remarks(f"{trial.trial_id} is being trained by another process; passed")
            return
        self.watcher.trial_begins(trial)
        try:
            with _Heartbeat(self.store, attempt) as heart:
                outcome = self._outcome(trial, heart)
        except _TakenOver:
            self.watcher.remarks(f"{trial.trial_id} was taken over by another process; dropped")
            return
        except BaseException:
            self.store.release(attempt)
            raise
        if self.store.finish(attempt, outcome):
            self.folder.snapshot(trial.trial_id).unlink(missing_ok=True)
            self.watcher.trial_ends(trial, outcome)
        else:
            self.watcher.remarks(f"{trial.trial_id} was taken over by another process; dropped")

    def _outcome(self, trial: Trial, heart: "_Heartbeat") -> Outcome:
        """The trial's outcome; its adapter, where one is wanted, is on disk before it is known."""
        began = self.clock()
        try:
            return self._trained(trial, heart)
        except (Interrupted, _TakenOver):
            raise
        except Exception as error:  # noqa: BLE001 - one failure must not cost the other trials
            return _failure(trial, error, seconds=self.clock() - began)

    def _trained(self, trial: Trial, heart: "_Heartbeat") -> Outcome:
        path = self.folder.snapshot(trial.trial_id)
        snapshot = self.workshop.load_snapshot(path) if path.is_file() else None
        last_snapshot = self.clock()

        def wants_snapshot() -> bool:
            return self.should_stop() or self.clock() - last_snapshot >= self.snapshot_seconds

        feed = _OneTrial(Work(trial, snapshot), wants_snapshot)
        events = self.workshop.engine(trial).train(feed)
        with closing(events):
            for event in events:
                match event:
                    case Progress():
                        self.watcher.update(trial, event)
                        if heart.lost:
                            raise _TakenOver
                    case Snapshot():
                        self.workshop.save_snapshot(path, event)
                        last_snapshot = self.clock()
                        self._stop_if_asked()
                    case Finished():
                        if event.adapter is not None and self._wants_adapters():
                            self._keep(trial, event.adapter)
                        return event.outcome
                    case Failed():
                        raise event.error
        raise AssertionError(f"the engine ended {trial.trial_id} without an outcome")

    def _keep(self, trial: Trial, adapter: "AdapterFiles") -> None:
        final = self.folder.adapter(trial.trial_id)
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        adapter.save(partial)
        replace_folder(partial, final)
        self.store.add_artifact(trial.trial_id, kind="adapter", path=str(final.resolve()))

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise Interrupted(f"stopped; `loratune run` with --out {self.folder.root} goes on")

    # Scoring ------------------------------------------------------------------------------------

    def _wants_adapters(self) -> bool:
        return bool(self.study.scored_tasks()) or self.study.keep_adapters != "none"

    def _scored_before_selection(self) -> tuple[str, ...]:
        """Tasks of which every trial's score is wanted, whether it is chosen or not."""
        if self.study.evaluate.when == "all":
            return self.study.scored_tasks()
        return (VALIDATION,) if self.study.select_on == "validation_accuracy" else ()

    def _score(self, trials: tuple[Trial, ...], tasks: tuple[str, ...]) -> None:
        if not tasks:
            return
        for result in self._results_of(trials, every_score=True):
            trial, done = result.trial, {score.key for score in result.scores}
            for task in tasks:
                if result.status != "done" or self.workshop.asks(trial, task=task) in done:
                    continue
                self._stop_if_asked()
                adapter = self._adapter(trial)
                why = "its adapter was not kept"
                if adapter is not None:
                    try:
                        score, predictions = self.workshop.score(trial, adapter, task=task)
                    except Exception as error:  # noqa: BLE001 - it must not cost the other trials
                        why = " ".join(f"{type(error).__name__}: {error}".split())
                    else:
                        self.store.add_score(trial.trial_id, score, predictions)
                        self.watcher.scored(trial, score)
                        continue
                self.num_not_scored += 1
                self.watcher.remarks(f"{trial.trial_id} can't be scored on {task}: {why}")

    def _adapter(self, trial: Trial) -> Path | None:
        """Where the trial's adapter lies: here, or in the folder that trained it."""
        here = self.folder.adapter(trial.trial_id)
        if here.is_dir():
            return here
        elsewhere = self.store.artifact(trial.trial_id, kind="adapter")
        return Path(elsewhere) if elsewhere is not None and Path(elsewhere).is_dir() else None

    # The end of a cell --------------------------------------------------------------------------

    def _settle(self, trials: tuple[Trial, ...]) -> None:
        """Score a cell's trials, choose its LR, and drop the adapters that are not kept."""
        self._score(trials, self._scored_before_selection())
        (cell,) = make_cells(self._results_of(trials))
        if cell.best is not None:
            chosen = tuple(result.trial for result in cell.best.trials)
            self._score(chosen, self.study.scored_tasks())
        if any(result.status not in FINAL_STATUSES for result in cell.results):
            return  # What failed is tried again: which trial is best is not known yet.
        kept = {
            "none": set[str](),
            "best": _best_trial(cell),
            "all": {trial.trial_id for trial in trials},
        }[self.study.keep_adapters]
        for trial in trials:
            if trial.trial_id not in kept and self.folder.adapter(trial.trial_id).is_dir():
                # The row first: a row without a folder would be a lie, a folder without one is not.
                self.store.remove_artifact(trial.trial_id, kind="adapter")
                shutil.rmtree(self.folder.adapter(trial.trial_id))

    def _results_of(
        self, trials: tuple[Trial, ...], *, every_score: bool = False
    ) -> tuple[TrialResult, ...]:
        wanted = {trial.trial_id for trial in trials}
        found = self._results(every_score=every_score)
        return tuple(result for result in found if result.trial.trial_id in wanted)

    def _results(self, *, every_score: bool = False) -> tuple[TrialResult, ...]:
        return self.store.results(self.study.study, with_losses=False, every_score=every_score)


@dataclass
class _OneTrial:
    """A feed of one trial."""

    work: Work
    wants_snapshot: Callable[[], bool]
    given: bool = False

    def waiting(self) -> tuple[Trial, ...]:
        return () if self.given else (self.work.trial,)

    def claim(self, trial: Trial) -> Work:
        assert trial == self.work.trial
        self.given = True
        return self.work

    def is_dropped(self, trial_id: str) -> bool:
        assert trial_id == self.work.trial.trial_id
        return False  # The loop itself stops a trial that was taken over.


class _TakenOver(Exception):
    """Another process holds the trial now."""


class _Heartbeat:
    """Says from a thread of its own that a trial is alive, however long one update takes.

    `lost` becomes True when the store answers that another process has taken the trial over.
    """

    def __init__(self, store: Store, attempt: int) -> None:
        self.lost = False
        self._store, self._attempt = store, attempt
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "_Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            # A store that can't be reached now may be reached again before the claim expires.
            with suppress(StoreError):
                if self._store.heartbeat([self._attempt]):
                    self.lost = True
                    return


def _best_trial(cell: Cell) -> set[str]:
    """The id of the best seed's trial at the cell's best LR; none where no LR is eligible."""
    if cell.best is None:
        return set()
    scored = [
        (score, result.trial.trial_id)
        for score, result in zip(cell.best.seed_scores, cell.best.trials, strict=True)
        if score is not None
    ]
    best = max(scored) if cell.metric.higher_is_better else min(scored)
    return {best[1]}


def _failure(trial: Trial, error: Exception, *, seconds: float) -> Outcome:
    return Outcome(
        trial_id=trial.trial_id,
        status="failed",
        num_updates=0,
        train_loss=None,
        validation_loss=None,
        seconds=seconds,
        num_tokens=0,
        peak_memory_bytes=None,
        rows_per_microbatch=None,
        reason=" ".join(str(error).split()) or type(error).__name__,
        error="".join(traceback.format_exception(error)),
    )

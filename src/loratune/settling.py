"""The end of a cell, once all its trials have been tried: scores, its best LR, what is kept.

Scoring needs the base model, which an engine holds while it trains. A cell with something to score
therefore waits until no engine is at work; one with nothing to score is settled at once, so that
adapters which are not kept do not fill the disk. What failed is tried again by the next sweep: its
cell keeps its adapters until then.
"""

import shutil
from collections.abc import Callable, Collection, Iterable
from itertools import groupby
from pathlib import Path

from loratune.analyse.cells import Cell, make_cells
from loratune.folder import ResultsFolder
from loratune.planning.build import Plan
from loratune.records import FINAL_STATUSES, Trial, TrialResult
from loratune.store.database import Store
from loratune.study.identity import cell_key
from loratune.study.schema import VALIDATION, Study
from loratune.training import Watcher, Workshop, interrupted


class Settling:
    """The cells of one plan, from the first trial that is tried to the last cell that is settled.

    `num_not_scored` counts the scores that were wanted and could not be had.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        finished: Collection[str],
        study: Study,
        folder: ResultsFolder,
        store: Store,
        workshop: Workshop,
        watcher: Watcher,
        should_stop: Callable[[], bool],
    ) -> None:
        self.num_not_scored = 0
        self.study = study
        self.folder = folder
        self.store = store
        self.workshop = workshop
        self.watcher = watcher
        self.should_stop = should_stop
        # The cells that are not settled, and which of their trials are untried.
        self._cells = dict[tuple[object, ...], tuple[Trial, ...]]()
        self._untried = dict[tuple[object, ...], set[str]]()
        for key, cell in groupby(plan.trials, key=cell_key):  # The plan keeps a cell together.
            self._cells[key] = tuple(cell)
            self._untried[key] = {one.trial_id for one in self._cells[key]} - set(finished)

    def has_ended(self, trial: Trial) -> None:
        """A trial has its outcome; an engine may be at work."""
        key = cell_key(trial)
        self._untried[key].discard(trial.trial_id)
        if not self.study.scored_tasks():
            self._settle_tried([key])

    def have_been_tried(self, trials: Iterable[Trial]) -> None:
        """These trials have an outcome or can't have one now; no engine is at work."""
        keys = dict[tuple[object, ...], None]()
        for trial in trials:
            key = cell_key(trial)
            self._untried[key].discard(trial.trial_id)
            keys[key] = None
        self._settle_tried(keys)

    def settle_all_tried(self) -> None:
        """Settle what has nothing left to try; no engine is at work."""
        self._settle_tried(tuple(self._cells))

    def _settle_tried(self, keys: Iterable[tuple[object, ...]]) -> None:
        for key in keys:
            if key in self._cells and not self._untried[key]:
                self._settle(self._cells[key])
                del self._cells[key]

    def _settle(self, trials: tuple[Trial, ...]) -> None:
        """Score a cell's trials, choose its LR, and drop the adapters that are not kept."""
        self._score(trials, self._scored_before_selection())
        (cell,) = make_cells(self._results(trials))
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

    def _scored_before_selection(self) -> tuple[str, ...]:
        """Tasks of which every trial's score is wanted, whether it is chosen or not."""
        if self.study.evaluate.when == "all":
            return self.study.scored_tasks()
        return (VALIDATION,) if self.study.select_on == "validation_accuracy" else ()

    def _score(self, trials: tuple[Trial, ...], tasks: tuple[str, ...]) -> None:
        if not tasks:
            return
        for result in self._results(trials, every_score=True):
            trial, done = result.trial, {score.key for score in result.scores}
            for task in tasks:
                if result.status != "done" or self.workshop.asks(trial, task=task) in done:
                    continue
                if self.should_stop():
                    raise interrupted(self.folder)
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

    def _results(
        self, trials: tuple[Trial, ...], *, every_score: bool = False
    ) -> tuple[TrialResult, ...]:
        return self.store.results(
            self.study.study,
            trial_ids=[trial.trial_id for trial in trials],
            with_losses=False,
            every_score=every_score,
        )


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

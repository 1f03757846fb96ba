"""What becomes of a cell once all its trials have been tried: more trials, scores, what is kept.

A study may ask for more once outcomes are known (`recommendation.rounds`): a cell's grid grows, its
best LR gets further seeds, and when no cell has anything left, the best one of each curve gets
fresh seeds that confirm it. An adaptive search (`recommendation.adaptive`) asks for all cells of a
curve together, round by round. A cell that asks for nothing more is settled: it is scored, its LR
is chosen, and the adapters that are not kept are dropped.

Scoring needs the base model, which an engine holds while it trains. A cell with something to score
therefore waits until no engine is at work; one with nothing to score is settled at once, so that
adapters which are not kept do not fill the disk. What failed is tried again by the next sweep: its
cell keeps its adapters until then.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from loratune.analyse.cells import Cell, answered_at, make_cells
from loratune.analyse.curves import make_curves
from loratune.analyse.scores import trial_score
from loratune.errors import StoreError
from loratune.folder import ResultsFolder
from loratune.planning.bar import Bar
from loratune.planning.build import Plan
from loratune.recommendation.early_stopping import bar
from loratune.recommendation.rounds import Point, confirmation, next_points_of, refinement
from loratune.recommendation.searched import answer_point, answered, observed
from loratune.records import (
    FINAL_STATUSES,
    NotScored,
    Purpose,
    QuestionSet,
    Scored,
    ToScore,
    Trial,
    TrialResult,
)
from loratune.scoring import known_answers, written
from loratune.store.database import Store
from loratune.study.identity import cell_key
from loratune.study.schema import VALIDATION, Study
from loratune.training import Watcher, Workshop, interrupted


@dataclass
class _Open:
    """A cell that is not settled. `asks_more`: its outcomes may still call for more trials."""

    trials: tuple[Trial, ...]
    untried: set[str]
    asks_more: bool
    purpose: Purpose = "search"


class Settling:
    """The cells of one plan, from the first trial that is tried to the last cell that is settled.

    `num_not_scored` counts the scores that were wanted and could not be had: each is tried once.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_not_scored = 0
        self.clock = clock
        self.study = study
        self.folder = folder
        self.store = store
        self.workshop = workshop
        self.watcher = watcher
        self.should_stop = should_stop
        self._plan = plan
        self._cells = dict[tuple[object, ...], _Open]()
        self._key_of = dict[str, tuple[object, ...]]()
        self._tried_to_score = set[tuple[str, str]]()
        rates = study.learning_rate
        asks_more = bool(rates.extend or study.seeds.around_best or rates.search)
        purpose: Purpose = "search" if rates.search is None else "adaptive"
        for key, cell in groupby(plan.trials, key=cell_key):  # The plan keeps a cell together.
            trials = tuple(cell)
            untried = {one.trial_id for one in trials} - set(finished)
            self._cells[key] = _Open(trials, untried, asks_more, purpose)
            self._key_of |= {one.trial_id: key for one in trials}
        # By trial id: what stops a trial of an adaptive search half-way. It grows with every round.
        self.bars = dict[str, Bar]()
        self._has_confirmed = not study.seeds.confirm
        self._searched_with = self._curves() if study.learning_rate.search is not None else {}
        # By the keys of a curve's cells: the point that its search answers.
        self._answers = dict[tuple[tuple[object, ...], ...], tuple[int, float] | None]()

    def has_ended(self, trial: Trial) -> tuple[Trial, ...]:
        """A trial has its outcome, an engine may be at work; what is to be trained besides."""
        return self._have_been_tried([trial], idle=False)

    def have_been_tried(self, trials: Iterable[Trial]) -> tuple[Trial, ...]:
        """These trials have an outcome or can't have one now; no engine is at work.

        Returns what is to be trained besides.
        """
        return self._have_been_tried(trials, idle=True)

    def settle_all_tried(self) -> tuple[Trial, ...]:
        """Settle what has nothing left to try; no engine is at work.

        Returns what is to be trained besides.
        """
        return self._advance(tuple(self._cells), idle=True)

    def _have_been_tried(self, trials: Iterable[Trial], *, idle: bool) -> tuple[Trial, ...]:
        keys = dict[tuple[object, ...], None]()
        for trial in trials:
            key = self._key_of[trial.trial_id]
            if key in self._cells:
                self._cells[key].untried.discard(trial.trial_id)
            keys[key] = None
        return self._advance(tuple(keys), idle=idle)

    def _advance(self, keys: Collection[tuple[object, ...]], *, idle: bool) -> tuple[Trial, ...]:
        """Refine and settle cells as far as can be done now; what is to be trained besides.

        What is to be scored is scored for all of these cells together: many adapters answer at
        once, and those of one cell would be few.
        """
        further = list[Trial]()
        tried = {
            key: cell
            for key in keys
            if (cell := self._cells.get(key)) is not None and not cell.untried
        }
        if idle:
            search = [cell for cell in tried.values() if cell.purpose != "confirm"]
            self._score(_trials_of(search), self._scored_before_selection())
        for key, cell in tuple(tried.items()):
            if cell.asks_more and cell.purpose == "adaptive":
                further += self._search(self._searched_with[key])
                if not cell.asks_more:  # The others of the curve can be settled, too.
                    tried |= {one: self._cells[one] for one in self._searched_with[key]}
            elif cell.asks_more and (idle or self.study.select_on == "validation_loss"):
                further += self._refine(key, cell)
        settled = {
            key: cell for key, cell in tried.items() if not cell.untried and not cell.asks_more
        }
        if not idle and self.study.scored_tasks():
            for cell in settled.values():
                self._drop_unchosen(cell)
        else:
            chosen = [self._chosen(cell) for cell in settled.values()]
            self._score([one for trials in chosen for one in trials], self.study.scored_tasks())
            for key, cell in settled.items():
                self._settle(cell)
                del self._cells[key]
        if not self._cells and not self._has_confirmed:
            further += self._confirm()
        if further:
            self.watcher.plans_more(further)
        return tuple(further)

    def _refine(self, key: tuple[object, ...], cell: _Open) -> list[Trial]:
        """Add what the cell's outcomes call for, until it calls for nothing that is not there."""
        while True:
            if self.study.select_on != "validation_loss":
                self._score(cell.trials, self._scored_before_selection())
            results = self._results(cell.trials)
            if any(result.status in ("planned", "running") for result in results):
                break  # Another process has some of it: what is best is not known here.
            (made,) = make_cells(results)
            points = refinement(made, rates=self.study.learning_rate, seeds=self.study.seeds)
            if not points:
                break
            new = self._add(key, cell, points)
            if new:
                return new
        cell.asks_more = False
        return []

    def _search(self, keys: Sequence[tuple[object, ...]]) -> list[Trial]:
        """Add what an adaptive search proposes for a curve, once all that it has was tried.

        The rounds begin with the first design whatever has been trained since, so that a study that
        was stopped asks for the same.
        """
        cells = {key: self._cells[key] for key in keys}
        at_size = {cell.trials[0].batch_size: key for key, cell in cells.items()}
        while not any(cell.untried for cell in cells.values()):
            trials = tuple(trial for cell in cells.values() for trial in cell.trials)
            results = self._results(trials, with_losses=True)
            if any(result.status in ("planned", "running") for result in results):
                return []  # Another process has some of it.
            points = next_points_of(self.study, observed(results))
            new = list[Trial]()
            for size, key in at_size.items():
                wanted = [(one.learning_rate, one.seed) for one in points if one.batch_size == size]
                if wanted:
                    new += self._add(key, cells[key], wanted)
            if new:
                self._set_bars(new, known=results)
                return new
            if not points:
                for cell in cells.values():
                    cell.asks_more = False
                break
        return []

    def _set_bars(self, trials: Sequence[Trial], *, known: Sequence[TrialResult]) -> None:
        """What these trials must reach half-way, by those of the rounds before theirs."""
        if not self.study.learning_rate.stops_early:
            return
        for trial in trials:
            found = bar(trial.num_updates, known)
            if found is not None:
                self.bars[trial.trial_id] = found

    def _curves(self) -> dict[tuple[object, ...], tuple[tuple[object, ...], ...]]:
        """By each cell's key the keys of all cells of its curve."""
        trials = [cell.trials[0] for cell in self._cells.values()]
        planned = [
            TrialResult(self.study.study, self.study.select_on, trial, "planned", None, (), None)
            for trial in trials
        ]
        groups = [
            tuple(cell_key(cell.trial) for cell in curve.cells)
            for curve in make_curves(make_cells(planned))
        ]
        return {key: group for group in groups for key in group}

    def _confirm(self) -> list[Trial]:
        """Add the fresh seeds of each curve's best cell."""
        self._has_confirmed = True
        further = list[Trial]()
        results = self.store.results(self.study.study)
        for curve in make_curves(answered(results)):
            chosen = confirmation(curve.cells, seeds=self.study.seeds)
            if chosen is None:
                continue
            best, points = chosen
            cell = _Open((best.trial,), set(), asks_more=False, purpose="confirm")
            key = ("confirm", *cell_key(best.trial))
            self._cells[key] = cell
            further += self._add(key, cell, points)
        return further

    def _add(self, key: tuple[object, ...], cell: _Open, points: Iterable[Point]) -> list[Trial]:
        """Add the trials at these points to the study and the cell; those that want training."""
        new = self._plan.siblings(cell.trials[0], points)
        self.store.add_trials(self.study.study, new, purpose=cell.purpose)
        # A store that studies share may have them already.
        stand = {one.trial.trial_id for one in self._results(new) if one.status in FINAL_STATUSES}
        self._key_of |= {one.trial_id: key for one in new}
        wanted = [one for one in new if one.trial_id not in stand]
        cell.untried |= {one.trial_id for one in wanted}
        cell.trials = new if cell.purpose == "confirm" else (*cell.trials, *new)
        return wanted

    def _chosen(self, cell: _Open) -> tuple[Trial, ...]:
        """The trials of a cell that all tasks are asked of: those at its best LR.

        What selects must be scored by now.
        """
        if cell.purpose == "confirm":
            return cell.trials
        self._score(cell.trials, self._scored_before_selection())
        made = self._made(cell)
        return () if made.best is None else tuple(one.trial for one in made.best.trials)

    def _settle(self, cell: _Open) -> None:
        """Drop the adapters of a cell that are not kept; all of it is scored that is to be."""
        if cell.purpose == "confirm":
            if self.study.keep_adapters != "all":
                self._drop_adapters(cell.trials)
            return
        made = self._made(cell)
        if any(result.status not in FINAL_STATUSES for result in made.results):
            return  # What failed is tried again: which trial is best is not known yet.
        kept = {
            "none": set[str](),
            "best": _best_trial(made),
            "all": {trial.trial_id for trial in cell.trials},
        }[self.study.keep_adapters]
        self._drop_adapters(trial for trial in cell.trials if trial.trial_id not in kept)

    def _made(self, cell: _Open) -> Cell:
        """The cell as its outcomes are, with the answer of its curve's search where it lies there.

        The answer is read when the search asks for nothing more, and then stands.
        """
        (made,) = make_cells(self._results(cell.trials))
        if cell.purpose != "adaptive":
            return made
        keys = self._searched_with[cell_key(cell.trials[0])]
        if keys not in self._answers:
            of_curve = [
                result
                for result in self.store.results(self.study.study)
                if cell_key(result.trial) in keys
            ]
            self._answers[keys] = answer_point(of_curve)
        point = self._answers[keys]
        if point is None or made.trial.batch_size != point[0]:
            return made
        return answered_at(made, point[1])

    def _drop_unchosen(self, cell: _Open) -> None:
        """Before a cell is scored: drop the adapters that will be neither scored nor kept.

        A pack may hold all cells of a study, and their adapters would fill the disk meanwhile.
        """
        if (
            cell.purpose == "confirm"
            or self._scored_before_selection()
            or self.study.keep_adapters == "all"
        ):
            return
        made = self._made(cell)
        if all(result.status in FINAL_STATUSES for result in made.results):
            chosen = () if made.best is None else made.best.trials
            scored = {result.trial.trial_id for result in chosen}
            self._drop_adapters(one for one in cell.trials if one.trial_id not in scored)

    def _drop_adapters(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            if self.folder.adapter(trial.trial_id).is_dir():
                # The row first: a row without a folder would be a lie, a folder without one is not.
                self.store.remove_artifact(trial.trial_id, kind="adapter")
                shutil.rmtree(self.folder.adapter(trial.trial_id))

    def _scored_before_selection(self) -> tuple[str, ...]:
        """Tasks of which every trial's score is wanted, whether it is chosen or not."""
        if self.study.evaluate.when == "all":
            return self.study.scored_tasks()
        return (VALIDATION,) if self.study.select_on == "validation_accuracy" else ()

    def _score(self, trials: Sequence[Trial], tasks: tuple[str, ...]) -> None:
        """Score these trials on these tasks, where they are not and it has not been tried yet."""
        if not tasks or not trials:
            return
        missing = list[tuple[Trial, str, QuestionSet]]()
        for result in self._results(trials, every_score=True):
            trial, done = result.trial, {score.key for score in result.scores}
            for task in tasks:
                if (
                    result.status != "done"
                    or (trial.trial_id, task) in self._tried_to_score
                    or self.workshop.asks(trial, task=task) in done
                ):
                    continue
                self._tried_to_score.add((trial.trial_id, task))
                missing.append((trial, task, self.workshop.questions(trial, task=task)))
        of_trial = [(trial.trial_id, questions) for trial, _, questions in missing]
        known = known_answers(self.store, self.study.study, of_trial)
        wanted = list[ToScore]()
        asked = list[tuple[str, QuestionSet]]()
        for (trial, task, questions), kept in zip(missing, known, strict=True):
            adapter = self._adapter(trial)
            if adapter is None and len(kept) < len(questions.references):
                self._not_scored(trial, task, "its adapter was not kept")
                continue
            place = adapter or self.folder.adapter(trial.trial_id)
            wanted.append(ToScore(trial, place, task, kept))
            asked.append((trial.trial_id, questions))
        if wanted:
            self._score_wanted(wanted, asked)

    def _score_wanted(
        self, wanted: Sequence[ToScore], asked: Sequence[tuple[str, QuestionSet]]
    ) -> None:
        left = dict(enumerate(wanted))
        events = written(
            self.workshop.score(wanted, remark=self.watcher.remarks),
            asked,
            store=self.store,
            clock=self.clock,
        )
        with closing(events):
            while True:
                if self.should_stop():
                    raise interrupted(self.folder)
                try:
                    event = next(events, None)
                except StoreError:
                    raise
                except Exception as error:  # noqa: BLE001 - it must not cost the trials
                    why = " ".join(f"{type(error).__name__}: {error}".split())
                    for one in left.values():
                        self._not_scored(one.trial, one.task, why)
                    return
                if event is None:
                    return
                one = wanted[event.asked]
                if isinstance(event, Scored):
                    self.watcher.scored(one.trial, event.score)
                    del left[event.asked]
                elif isinstance(event, NotScored):
                    self._not_scored(one.trial, one.task, event.reason)
                    del left[event.asked]

    def _not_scored(self, trial: Trial, task: str, why: str) -> None:
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
        self, trials: Sequence[Trial], *, with_losses: bool = False, every_score: bool = False
    ) -> tuple[TrialResult, ...]:
        return self.store.results(
            self.study.study,
            trial_ids=[trial.trial_id for trial in trials],
            with_losses=with_losses,
            every_score=every_score,
        )


def _trials_of(cells: Iterable[_Open]) -> list[Trial]:
    return [trial for cell in cells for trial in cell.trials]


def _best_trial(cell: Cell) -> set[str]:
    """The id of the best seed's trial at the cell's best LR; none where no LR is eligible."""
    if cell.best is None:
        return set()
    scored = [
        (score, result.trial.trial_id)
        for result in cell.best.trials
        if (score := trial_score(result, cell.metric)) is not None
    ]
    best = max(scored) if cell.metric.higher_is_better else min(scored)
    return {best[1]}

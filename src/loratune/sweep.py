"""The loop: plan, engine, evaluation and store meet here and nowhere else. Resume lives here.

Crash-only: what is finished is in the store, in one transaction; what is under way is in a snapshot
of at most `snapshot_seconds` ago; the rest is planned again from the study. Running a study and
going on with it are the same call. A trial that fails is recorded with its traceback and the others
go on; one that diverges costs only itself. `training.py` is how trials come to their outcomes,
`settling.py` what is done with a cell that has all of them.

No torch is imported here: engines come from a `Workshop`, so that a sweep can be tested, and its
results read, without one.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.crew import Assignment, CrewMember, train_in_crew
from loratune.folder import ResultsFolder, working_folder
from loratune.records import FINAL_STATUSES, Trial, TrialResult
from loratune.settling import Settling
from loratune.study.loading import LoadedStudy
from loratune.training import SNAPSHOT_SECONDS, Training, Watcher, Workshop


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
    crew: Sequence[CrewMember] = (),
) -> Sweep:
    """Train what is not trained yet, score what is not scored yet, keep what is to be kept.

    Args:
        loaded: the study.
        out: the results folder; made where it is missing, gone on with where it is this study's.
        store: address of a store outside the folder, shared with other studies.
        should_stop: asked after every update; True ends the sweep with a snapshot.
        crew: processes that train in the place of this one, each with a workshop of its own;
            `workshop` then only scores, once they have ended.

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
            purpose="search" if study.learning_rate.search is None else "adaptive",
        )
        for fingerprint, summary in workshop.data_summaries().items():
            opened.add_data_summary(fingerprint, summary)
        if not study.learning_rate.stops_early:
            # Another study that shares the store was content with half of these trials.
            opened.forget_stopped(ids)
        finished = frozenset(
            result.trial.trial_id
            for result in opened.results(study.study, with_losses=False)
            if result.status in FINAL_STATUSES
        )
        watcher.begins(plan, finished=finished)
        for remark in workshop.remarks():
            watcher.remarks(remark)
        settling = Settling(
            plan,
            finished=finished,
            study=study,
            folder=folder,
            store=opened,
            workshop=workshop,
            watcher=watcher,
            should_stop=should_stop,
            clock=clock,
        )
        further = settling.settle_all_tried()
        left = tuple(trial for trial in plan.trials if trial.trial_id not in finished)
        wants_adapters = bool(study.scored_tasks()) or study.keep_adapters != "none"
        if crew:
            assignment = Assignment(
                study=study.study,
                folder=folder,
                trials=(*left, *further),
                wants_adapters=wants_adapters,
                snapshot_seconds=snapshot_seconds,
                since=opened.newest_attempt(),
                bars=settling.bars,
            )
            while assignment.trials:
                training_of_all = train_in_crew(
                    crew, assignment, store=opened, watcher=watcher, should_stop=should_stop
                )
                further = ()
                with closing(training_of_all) as ended:
                    for trial in ended:
                        further += settling.has_ended(trial)
                # Only now: scoring loads the base on a device that was training.
                further += settling.have_been_tried(assignment.trials)
                further += settling.settle_all_tried()
                assignment = replace(assignment, trials=further, since=opened.newest_attempt())
        else:
            training = Training(
                folder=folder,
                store=opened,
                workshop=workshop,
                watcher=watcher,
                wants_adapters=wants_adapters,
                should_stop=should_stop,
                snapshot_seconds=snapshot_seconds,
                clock=clock,
                bars=settling.bars,
            )
            _train_here((*left, *further), training, settling)
        return Sweep(
            folder=folder,
            results=opened.results(study.study),
            num_not_scored=settling.num_not_scored,
        )


def _train_here(trials: Sequence[Trial], training: Training, settling: Settling) -> None:
    """Train the trials and what their outcomes call for, one group after another."""
    waiting = list(training.workshop.groups(trials))
    while waiting:
        others = _train_group(waiting.pop(0), training, settling)
        waiting += training.workshop.groups(others)


def _train_group(
    group: tuple[Trial, ...], training: Training, settling: Settling
) -> tuple[Trial, ...]:
    """Train a group and what can join it; what its outcomes call for besides."""
    joined, others = list(group), list[Trial]()

    def calls_for(trial: Trial) -> Sequence[Trial]:
        further = settling.has_ended(trial)
        here = [one for one in further if len(training.workshop.groups((group[0], one))) == 1]
        joined.extend(here)
        others.extend(one for one in further if one not in here)
        return here

    with closing(training.train(group, calls_for=calls_for)) as ended:
        for _ in ended:
            pass
    return (*others, *settling.have_been_tried(joined))

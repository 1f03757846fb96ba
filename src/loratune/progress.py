"""What a person sees while a sweep runs: one line on stderr with trials done, rows/s and ETA.

Results never go through here. Where stderr is no terminal, a plain line a trial is printed.
"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from loratune.engine.base import Progress as UpdateDone
from loratune.planning.build import Plan
from loratune.records import Outcome, Score, Trial


def describe_trial(trial: Trial) -> str:
    """A trial in a few words, as people tell trials apart."""
    return (
        f"{trial.method.name} r={trial.rank} batch={trial.batch_size} "
        f"lr={trial.learning_rate:g} seed={trial.seed}"
    )


def readable_seconds(seconds: float) -> str:
    """42s, 3m 10s, 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class ProgressLine:
    """A `training.Watcher` for people: use it as a context manager."""

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._clock = clock
        self._bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f} trials"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1)
        self._total_rows = self._rows_done = 0
        self._done = self._num_trials = 0
        # How far each trial under way is, a fraction, and the sum of them.
        self._shares = dict[str, float]()
        self._sum_of_shares = 0.0
        self._began = clock()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begins(self, plan: Plan, *, finished: frozenset[str]) -> None:
        """See `training.Watcher`."""
        left = [trial for trial in plan.trials if trial.trial_id not in finished]
        self._num_trials, self._done = len(plan.trials), len(plan.trials) - len(left)
        self._total_rows = sum(trial.num_samples for trial in left)
        self._began = self._clock()
        self._bar.update(self._task, total=self._num_trials, completed=self._done)
        stand = f", {self._done} of them done before" if self._done else ""
        self._console.print(f"{self._num_trials} trials{stand}", highlight=False)

    def plans_more(self, trials: Sequence[Trial]) -> None:
        """See `training.Watcher`."""
        self._num_trials += len(trials)
        self._total_rows += sum(trial.num_samples for trial in trials)
        self._bar.update(self._task, total=self._num_trials)
        first = trials[0]
        sizes = sorted({trial.batch_size for trial in trials})
        more = "1 more trial" if len(trials) == 1 else f"{len(trials)} more trials"
        self._console.print(
            f"{more} of {first.method.name} r={first.rank} batch={','.join(map(str, sizes))}",
            highlight=False,
            markup=False,
        )

    def trial_begins(self, trial: Trial) -> None:
        """See `training.Watcher`."""
        self._set_share(trial, 0.0)
        self._bar.update(self._task, description=self._described(trial))

    def update(self, trial: Trial, progress: UpdateDone) -> None:
        """See `training.Watcher`."""
        self._rows_done += progress.num_rows
        self._set_share(trial, (progress.update + 1) / trial.num_updates)
        self._bar.update(
            self._task,
            completed=self._done + self._sum_of_shares,
            description=f"{self._described(trial)} loss={progress.loss:.3f} {self._speed()}",
        )

    def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
        """See `training.Watcher`."""
        self._done += 1
        self._sum_of_shares -= self._shares.pop(trial.trial_id, 0.0)
        self._bar.update(self._task, completed=self._done + self._sum_of_shares)
        if outcome.status == "done":
            loss = outcome.validation_loss
            said = "done" if loss is None else f"validation loss {loss:.4f}"
        else:
            at = outcome.stopped_at_update
            where = "" if at is None else f" at update {at + 1} of {trial.num_updates}"
            said = f"{outcome.status.replace('_', ' ')}{where}: {outcome.reason}"
        self._console.print(
            f"[{self._done}/{self._num_trials}] {describe_trial(trial)}: {said} ({self._speed()})",
            highlight=False,
            markup=False,
        )

    def scored(self, trial: Trial, score: Score) -> None:
        """See `training.Watcher`."""
        self._console.print(
            f"{describe_trial(trial)}: {score.task} {score.correct} of {score.total} right",
            highlight=False,
            markup=False,
        )

    def remarks(self, text: str) -> None:
        """See `training.Watcher`."""
        self._console.print(text, highlight=False, markup=False)

    def _set_share(self, trial: Trial, share: float) -> None:
        self._sum_of_shares += share - self._shares.get(trial.trial_id, 0.0)
        self._shares[trial.trial_id] = share

    def _described(self, trial: Trial) -> str:
        others = len(self._shares) - 1
        return describe_trial(trial) + (f" and {others} more" if others > 0 else "")

    def _speed(self) -> str:
        elapsed = self._clock() - self._began
        if elapsed <= 0 or not self._rows_done:
            return "0 rows/s"
        rate = self._rows_done / elapsed
        left = readable_seconds(max(0.0, self._total_rows - self._rows_done) / rate)
        return f"{rate:.0f} rows/s, {left} left"

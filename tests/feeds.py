"""A feed over a list of trials, for tests of engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loratune.engine.base import Snapshot, Work
from loratune.records import Trial


@dataclass
class ListFeed:
    """Gives out its trials; `snapshots` are what some go on from, `dropped` those taken away."""

    trials: Sequence[Trial]
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    wants: Callable[[], bool] = lambda: False
    dropped: set[str] = field(default_factory=set)
    given: list[str] = field(default_factory=list)

    def waiting(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.trial_id not in self.given]

    def claim(self, trial: Trial) -> Work:
        self.given.append(trial.trial_id)
        return Work(trial, self.snapshots.get(trial.trial_id))

    def is_begun(self, trial: Trial) -> bool:
        return trial.trial_id in self.snapshots

    def wants_snapshot(self) -> bool:
        return self.wants()

    def is_dropped(self, trial_id: str) -> bool:
        return trial_id in self.dropped

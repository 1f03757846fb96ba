"""A feed for engine tests: trials from a list, and what to answer to the engine's questions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loratune.engine.base import Snapshot, Work
from loratune.planning.bar import Bar
from loratune.records import Trial


@dataclass
class ListFeed:
    """Gives out `trials` in their order, each with its snapshot where there is one.

    `taken` are the ids of trials that somebody else trains; `claimed` notes what was given out.
    """

    trials: Sequence[Trial]
    snapshots: Mapping[str, Snapshot | None] = field(default_factory=dict[str, Snapshot | None])
    taken: frozenset[str] = frozenset()
    wants: Callable[[], bool] = lambda: False
    drops: Callable[[str], bool] = lambda trial_id: False
    bars: Mapping[str, Bar] = field(default_factory=dict[str, Bar])
    claimed: list[str] = field(default_factory=list[str])
    _given: set[str] = field(default_factory=set[str])

    def waiting(self) -> Sequence[Trial]:
        return [trial for trial in self.trials if trial.trial_id not in self._given]

    def claim(self, trial: Trial) -> Work | None:
        assert trial.trial_id not in self._given, "a trial is claimed once"
        self._given.add(trial.trial_id)
        if trial.trial_id in self.taken:
            return None
        self.claimed.append(trial.trial_id)
        name = trial.trial_id
        return Work(trial, self.snapshots.get(name), self.bars.get(name))

    def is_begun(self, trial: Trial) -> bool:
        return self.snapshots.get(trial.trial_id) is not None

    def wants_snapshot(self) -> bool:
        return self.wants()

    def is_dropped(self, trial_id: str) -> bool:
        return self.drops(trial_id)

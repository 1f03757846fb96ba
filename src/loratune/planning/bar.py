"""What a trial must have reached half-way through its training, or it is stopped there.

Engines look at it; `recommendation.early_stopping` sets it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from loratune.records import TrialResult

# Of all updates.
HALF_WAY = 0.5
STRETCH = 0.1


@dataclass(frozen=True, slots=True)
class Bar:
    """A training loss that a trial must be below by then, or it is stopped.

    The mean over updates `begin` to `end` - 1, looked at once, when the last of them is made.
    """

    begin: int
    end: int
    loss: float

    def reason_after(self, losses: Sequence[float]) -> str | None:
        """Why the trial is stopped with the last of these losses, or None where it is not."""
        if len(losses) != self.end:
            return None
        mean = math.fsum(losses[self.begin :]) / (self.end - self.begin)
        if mean <= self.loss:
            return None
        return (
            f"training loss {mean:.4g} over updates {self.begin + 1} to {self.end}, above "
            f"{self.loss:.4g}, so that it will not be among the best"
        )


def half_way_loss(result: TrialResult) -> float | None:
    """The mean training loss over the tenth of its updates before half-way, in nats."""
    losses = () if result.outcome is None else result.outcome.losses
    begin, end = stretch_before_half_way(result.trial.num_updates)
    if len(losses) < end:
        return None
    mean = fmean(losses[begin:end])
    return mean if 0.0 < mean < math.inf else None


def stretch_before_half_way(num_updates: int) -> tuple[int, int]:
    """The first and the last update but one of the tenth before half-way; one at least."""
    end = max(1, math.ceil(HALF_WAY * num_updates))
    return min(end - 1, math.floor((HALF_WAY - STRETCH) * num_updates)), end

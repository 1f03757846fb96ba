"""What a trial must have reached at a point of its training, or it is stopped there.

Engines look at it; `recommendation.early_stopping` sets it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


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

"""Loss scaling for bases in float16, whose gradients below 6e-8 vanish.

Losses are multiplied by a power of two, as large as keeps the gradients finite. Start, factor and
patience are those of torch.amp.GradScaler. It would skip an update whose gradient overflows; here
the batch is made again at half the scale, because a trial has as many updates as were planned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast

import torch

FIRST_LOSS_SCALE = 2.0**16
UPDATES_BEFORE_GROWTH = 2000


@dataclass
class LossScale:
    """A trial's scale. It is 1, and stays 1, where the base is not in float16."""

    is_needed: bool
    value: float
    good_updates: int = 0

    @classmethod
    def first(cls, dtype: torch.dtype) -> Self:
        """What a trial over a base of this type begins with."""
        is_needed = dtype == torch.float16
        return cls(is_needed, FIRST_LOSS_SCALE if is_needed else 1.0)

    def has_overflowed(self, *, loss: float, norm: float) -> bool:
        """Take in a batch's loss and its gradient's norm, the scale taken out of both.

        True: the batch is to be made again, at the smaller scale that this has now. A norm that is
        not finite at the scale 1, or beside such a loss, is the trial's own doing.
        """
        if not self.is_needed:
            return False
        if math.isfinite(norm):
            self.good_updates += 1
            if self.good_updates == UPDATES_BEFORE_GROWTH:
                self.value, self.good_updates = self.value * 2, 0
            return False
        if self.value <= 1 or not math.isfinite(loss):
            return False
        self.value, self.good_updates = self.value / 2, 0
        return True

    def facts(self) -> dict[str, object]:
        """For a snapshot."""
        return {"loss_scale": self.value, "good_updates": self.good_updates}

    def take_over(self, facts: Mapping[str, object]) -> None:
        """Go on from what `facts()` gave."""
        self.value = cast("float", facts["loss_scale"])
        self.good_updates = cast("int", facts["good_updates"])

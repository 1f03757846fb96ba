"""When a trial counts as diverged: not finite, or a loss that leaves for good.

Divergence is an outcome with a step and a reason. The rule for "leaves for good" is ours: the loss
of a batch lies above a line half-way from the untrained model's loss to that of a uniform guess
(ln V), but at least one nat above the former (batches differ, and a model may start out worse than
a guess), for as many updates on end as a fifth of the training (20 at least), or over the last 10%
of updates. A learning rate that is merely bad ends below that line; a run that is broken sits on it
however long one waits. Only the first rule saves time; both say the same of a finished run.
"""

import math
from dataclasses import dataclass, field

SHARE_OF_UPDATES = 0.2
FEWEST_UPDATES = 20


def last_tenth(num_updates: int) -> int:
    """How many updates the last 10% are, rounded up."""
    return math.ceil(num_updates / 10)


@dataclass
class DivergenceWatch:
    """Watches the losses of one trial, in order, from update 0 (which sees the untrained model)."""

    num_updates: int
    vocab_size: int
    _line: float = math.inf
    _above: int = field(default=0)

    def reason_after(self, loss: float, *, update: int, grad_norm: float | None) -> str | None:
        """Why the trial has diverged with this update, or None while it has not."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if update == 0:
            uniform = math.log(self.vocab_size)
            self._line = max(loss + 1.0, (loss + uniform) / 2)
        self._above = self._above + 1 if loss > self._line else 0
        patience = max(FEWEST_UPDATES, math.ceil(SHARE_OF_UPDATES * self.num_updates))
        if self._above >= patience:
            return f"loss above {self._line:.3f} for {self._above} updates on end"
        return None

    def reason_at_end(self, train_loss: float, validation_loss: float | None) -> str | None:
        """Why a trial that made all its updates counts as diverged all the same, or None."""
        if validation_loss is not None and not math.isfinite(validation_loss):
            return f"validation loss is {validation_loss}"
        if train_loss > self._line:
            return f"loss above {self._line:.3f} over the last 10% of updates ({train_loss:.3f})"
        return None

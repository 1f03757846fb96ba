"""What a trial has done so far: all that an outcome is made of, and part of every snapshot."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from loratune.engine.divergence import DivergenceWatch, last_tenth
from loratune.records import FinishedStatus, Outcome, Trial


@dataclass
class Account:
    """Per update: the loss (token mean, nats), the gradient's norm before clipping, the targets."""

    losses: list[float] = field(default_factory=list[float])
    grad_norms: list[float] = field(default_factory=list[float])
    targets: list[int] = field(default_factory=list[int])
    num_tokens: int = 0
    seconds: float = 0.0

    def facts(self) -> dict[str, object]:
        """JSON-able, for a snapshot."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> "Account":
        """What `facts` gave; other keys are passed over."""
        return cls(
            losses=list(cast("Sequence[float]", facts["losses"])),
            grad_norms=list(cast("Sequence[float]", facts["grad_norms"])),
            targets=list(cast("Sequence[int]", facts["targets"])),
            num_tokens=cast("int", facts["num_tokens"]),
            seconds=cast("float", facts["seconds"]),
        )

    def replay(self, watch: DivergenceWatch) -> None:
        """Show a new watch all that its predecessor saw."""
        for update, (loss, norm) in enumerate(zip(self.losses, self.grad_norms, strict=True)):
            watch.reason_after(loss, update=update, grad_norm=norm)

    def train_loss(self, num_updates: int) -> float:
        """The token mean over the last 10% of `num_updates`."""
        tail = last_tenth(num_updates)
        losses, targets = self.losses[-tail:], self.targets[-tail:]
        return math.fsum(loss * count for loss, count in zip(losses, targets, strict=True)) / sum(
            targets
        )

    def outcome(self, trial: Trial, status: FinishedStatus, **more: Any) -> Outcome:
        """An outcome of the updates made; `more` are the fields that the account does not hold."""
        complete = len(self.losses) == trial.num_updates
        fields: dict[str, Any] = {"validation_loss": None, **more}
        return Outcome(
            trial_id=trial.trial_id,
            status=status,
            num_updates=len(self.losses),
            train_loss=self.train_loss(trial.num_updates) if complete else None,
            seconds=self.seconds,
            num_tokens=self.num_tokens,
            losses=tuple(self.losses),
            grad_norms=tuple(self.grad_norms),
            **fields,
        )

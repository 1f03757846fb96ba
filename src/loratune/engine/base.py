"""What every engine offers: a trial in, records out, one after another, until it is finished.

An engine writes nothing and knows no folder. It offers a `Snapshot` whenever its caller asks for
one; whoever stores it may hand it back to a later engine, which goes on as if nothing had happened.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loratune.records import Outcome, Trial

if TYPE_CHECKING:  # The sweep dispatches on these records and must start without torch.
    from torch import Tensor

    from loratune.methods.adapter_files import AdapterFiles


@dataclass(frozen=True, slots=True)
class Progress:
    """One update is done. `loss` is the token mean over its whole batch, in nats."""

    trial_id: str
    update: int
    num_rows: int
    loss: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the rest of a trial depends on, after `update` updates.

    `tensors` live on the CPU; `facts` is JSON-able: losses so far, the cut into micro-batches.
    """

    trial_id: str
    update: int
    tensors: "Mapping[str, Tensor]"
    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Finished:
    """The trial's outcome, and its adapter in PEFT's format where there is one worth keeping."""

    outcome: Outcome
    adapter: "AdapterFiles | None"


Event = Progress | Snapshot | Finished


class Engine(Protocol):
    """Trains trials of one base model, one data set at a time."""

    @property
    def name(self) -> str:
        """`reference` or `packed`: provenance of every outcome."""
        ...

    def train(
        self, trial: Trial, *, snapshot: Snapshot | None, wants_snapshot: Callable[[], bool]
    ) -> Generator[Event]:
        """Progress after every update, a snapshot whenever it is wanted, Finished at the end.

        `wants_snapshot` is asked after every update. Closing the iterator before its end leaves
        the base model as it was.
        """
        ...

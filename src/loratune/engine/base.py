"""What every engine offers: trials in, records out, until there is nothing left to train.

An engine asks its `Feed` for trials whenever it has room for one, trains one or many of them at a
time, and yields what happens. It writes nothing and knows no folder and no store. It offers a
`Snapshot` of every trial under way whenever its feed asks for one; whoever stores it may hand it
back to a later engine, which goes on as if nothing had happened.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loratune.planning.bar import Bar
from loratune.records import NoiseProbe, Outcome, Trial

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
    `engine` is the name of the one that made it; another can't go on from it.
    """

    trial_id: str
    update: int
    tensors: "Mapping[str, Tensor]"
    facts: Mapping[str, object]
    engine: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The trial's outcome, and its adapter in PEFT's format where there is one worth keeping."""

    outcome: Outcome
    adapter: "AdapterFiles | None"


@dataclass(frozen=True, slots=True)
class Failed:
    """The trial could not be begun (a method that refuses its values, say); the others go on."""

    trial_id: str
    error: Exception


Event = Progress | NoiseProbe | Snapshot | Finished | Failed


class Feed(Protocol):
    """Where an engine gets its trials from, and what it is told meanwhile."""

    def waiting(self) -> Sequence[Trial]:
        """The trials that may be begun now, in the plan's order; empty when all are given out."""
        ...

    def claim(self, trial: Trial) -> "Work | None":
        """Take a waiting trial. None where somebody else trains it: it no longer waits."""
        ...

    def is_begun(self, trial: Trial) -> bool:
        """Whether a waiting trial has a snapshot to go on from; such trials are begun first."""
        ...

    def wants_snapshot(self) -> bool:
        """Asked between updates: whether every trial under way is to be offered as a snapshot."""
        ...

    def is_dropped(self, trial_id: str) -> bool:
        """Whether a claimed trial is no longer ours: the engine forgets it without a word."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """A claimed trial, where to go on with it if it was begun before, and what may stop it."""

    trial: Trial
    snapshot: Snapshot | None = None
    bar: Bar | None = None


class Engine(Protocol):
    """Trains trials of one base model; which trials it takes, its workshop says."""

    @property
    def name(self) -> str:
        """`reference` or `packed`: provenance of every outcome."""
        ...

    def train(self, feed: Feed) -> Generator[Event]:
        """Train what waits in `feed` until nothing waits any more.

        Yields Progress after every update of a trial, NoiseProbes where its engine was told to make
        any, Snapshots when they are wanted, and Finished or Failed once for every claimed trial
        that is not dropped. A trial that begins anew or goes on may repeat probes. Closing the
        iterator before its end leaves the base model as it was.
        """
        ...

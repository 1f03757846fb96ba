"""Many adapters at a time, through `engine.train(feed)`: the call that `loratune run` makes."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from loratune.data.order import row_order
from loratune.data.prepare import PreparedData
from loratune.engine.base import Engine, Event, Failed, Finished, Progress, Work
from loratune.engine.packed import PackedEngine
from loratune.models.load import Base
from loratune.planning.pack_shape import pack_bytes
from loratune.planning.packing import PackShape
from loratune.records import ModelFacts, Trial
from measure import Advance
from model_shapes import TARGETS


def packed_engine(
    base: Base,
    data: PreparedData,
    *,
    num_slots: int,
    tokens_per_step: int,
    rank: int,
    method: str,
) -> PackedEngine:
    """The packed engine as `loratune run` makes it. The one place that knows its constructor."""
    return PackedEngine(
        base,
        {data.facts.fingerprint: data},
        shape=PackShape(
            num_slots=num_slots,
            tokens_per_step=tokens_per_step,
            rank=rank,
            magnitudes=method == "dora",
        ),
        targets=TARGETS,
    )


def planned_memory_bytes(pack: PackShape, facts: ModelFacts, precision: str) -> int:
    """What planning says that a pack needs."""
    return pack_bytes(pack, model=facts, precision=precision, targets=TARGETS)


class ListFeed:
    """`engine.base.Feed` over a list: every trial is there from the start and is ours for good."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._waiting = list(trials)

    def waiting(self) -> Sequence[Trial]:
        """See `engine.base.Feed`."""
        return tuple(self._waiting)

    def claim(self, trial: Trial) -> Work | None:
        """See `engine.base.Feed`."""
        self._waiting.remove(trial)
        return Work(trial)

    def is_begun(self, trial: Trial) -> bool:
        """Never: no snapshot is ever asked for."""
        return False

    def wants_snapshot(self) -> bool:
        """Never."""
        return False

    def is_dropped(self, trial_id: str) -> bool:
        """Never."""
        return False


@contextmanager
def packed(engine: Engine, data: PreparedData, trials: Sequence[Trial]) -> Generator[Advance]:
    """`advance` goes on until the first trial has made one more update, and counts all rows."""
    events = engine.train(ListFeed(trials))
    try:
        yield advance_by_events(events, data, trials)
    finally:
        events.close()


def advance_by_events(
    events: Iterator[Event], data: PreparedData, trials: Sequence[Trial]
) -> Advance:
    """One turn of the pack, told by its events.

    Slots are never empty, so that every turn yields about one event of each trial; a window from
    one event of the first trial to another holds whole turns, whatever the order within a turn.
    """
    trial_of = {trial.trial_id: trial for trial in trials}
    lead = trials[0].trial_id
    lengths = data.train.lengths
    equal = int(lengths[0]) if int(lengths.min()) == int(lengths.max()) else None

    def advance() -> tuple[int, int]:
        num_rows = num_tokens = 0
        for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                raise RuntimeError(f"a trial ended while it was timed: {event.outcome.reason}")
            if not isinstance(event, Progress):
                continue
            num_rows += event.num_rows
            if equal is None:
                num_tokens += _tokens(event, trial_of[event.trial_id], data)
            else:
                num_tokens += event.num_rows * equal
            if event.trial_id == lead:
                return num_rows, num_tokens
        raise RuntimeError("the engine had nothing to train any more")

    return advance


def _tokens(event: Progress, trial: Trial, data: PreparedData) -> int:
    rows = row_order(
        trial.seed,
        num_rows=trial.num_train_rows,
        start=event.update * trial.batch_size,
        count=event.num_rows,
    )
    return int(data.train.lengths[rows].sum())

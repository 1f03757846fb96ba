"""One process's share of a sweep: it claims trials, feeds engines, and writes what they yield.

Many trials may be under way at once, in one engine. Each is claimed in the store before it begins
and given back whatever happens; one thread says for all of them that this process lives. What is
finished is in the store; what is under way is in a snapshot file, as old as the last round of them.

What goes wrong costs as little as can be. What an engine blames on a trial costs that trial alone.
An engine that breaks with several trials under way tells nobody whose fault it is, so each of them
goes on alone from its last snapshot, and only the one that breaks again is recorded as failed.

Knows nothing of scores and cells, nor which processes share the store with it.
"""

import math
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from loratune.engine.base import Engine, Event, Failed, Finished, Progress, Snapshot, Work
from loratune.errors import StoreError
from loratune.folder import ResultsFolder, replace_folder
from loratune.planning.bar import Bar
from loratune.planning.build import Plan
from loratune.records import (
    DataSummary,
    NoiseProbe,
    NotScored,
    Outcome,
    Provenance,
    QuestionSet,
    Said,
    Score,
    Scored,
    ScoreKey,
    ToScore,
    Trial,
)
from loratune.store.database import Store

if TYPE_CHECKING:
    from loratune.methods.adapter_files import AdapterFiles

SNAPSHOT_SECONDS = 120.0
# Snapshots may cost a twentieth of the time: the pause between two rounds, in durations of a round.
PAUSE_IN_ROUNDS = 20.0
# How often a process that shares its trials asks the store how many of them are still open.
SECONDS_BETWEEN_COUNTS = 1.0
HEARTBEAT_SECONDS = 15.0


class Interrupted(Exception):
    """Not an error: the sweep stopped because it was asked to. The folder can be gone on with."""


def interrupted(folder: ResultsFolder) -> Interrupted:
    """What to raise where a sweep of this folder stops."""
    return Interrupted(f"stopped; `loratune run` with --out {folder.root} goes on")


class Workshop(Protocol):
    """What a sweep needs of models, data and devices: made for one study."""

    def plan(self) -> Plan:
        """The study's plan from the real models and data; nothing provisional in it."""
        ...

    def data_summaries(self) -> Mapping[str, DataSummary]:
        """What became of the rows, by data fingerprint."""
        ...

    def remarks(self) -> tuple[str, ...]:
        """What the user should know of models and data before training, in plain words."""
        ...

    def groups(self, trials: Sequence[Trial]) -> tuple[tuple[Trial, ...], ...]:
        """The trials, each once, in groups that one engine can train together."""
        ...

    def engine(
        self, group: Sequence[Trial], *, num_processes: int, remark: Callable[[str], None]
    ) -> Engine:
        """An engine for a group or some of it, on the group's base model.

        `num_processes` share the group, each with such an engine. `remark` is told what the user
        should know of the choice.
        """
        ...

    def provenance(self, engine: str) -> Provenance:
        """How the engine of that name trains here."""
        ...

    def asks(self, trial: Trial, *, task: str) -> ScoreKey:
        """What `score` would ask now, and how it would judge."""
        ...

    def questions(self, trial: Trial, *, task: str) -> QuestionSet:
        """What `score` would ask now, as the store keeps it."""
        ...

    def score(
        self, wanted: Sequence[ToScore], *, remark: Callable[[str], None]
    ) -> Generator[Said | Scored | NotScored]:
        """Score saved adapters, all that are wanted together; events name indices of `wanted`.

        Each ends with a `Scored` or a `NotScored`; its new answers are said before that. `remark`
        is told what the user should know of how they are asked.
        """
        ...

    def load_snapshot(self, path: Path) -> Snapshot | None:
        """A snapshot from a file; None where it is no whole one."""
        ...

    def save_snapshot(self, path: Path, snapshot: Snapshot) -> None:
        """A snapshot to a file, whole or not at all."""
        ...


class Watcher(Protocol):
    """Somebody who watches a sweep: a progress bar, a log, a test."""

    def begins(self, plan: Plan, *, finished: frozenset[str]) -> None:
        """The sweep begins; the trials of these ids stand already."""
        ...

    def plans_more(self, trials: Sequence[Trial]) -> None:
        """Outcomes call for more trials than were planned at the beginning."""
        ...

    def trial_begins(self, trial: Trial) -> None:
        """A trial is about to be trained; others may be under way."""
        ...

    def update(self, trial: Trial, progress: Progress) -> None:
        """An update is done."""
        ...

    def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
        """A trial's outcome is in the store."""
        ...

    def scored(self, trial: Trial, score: Score) -> None:
        """A score is in the store."""
        ...

    def remarks(self, text: str) -> None:
        """Something that the user should know."""
        ...


@dataclass(frozen=True)
class Training:
    """Trains groups of trials, one group after another.

    `since` is for processes that share a sweep: the newest attempt in the store when it began. What
    another of them holds is then nothing to remark on, and what has failed with one of them is not
    tried by the next. `num_processes` is how many they are: none holds more than its share of the
    trials that are still open, so that none is idle while another has all that is left. `bars`, by
    trial id, say what stops a trial half-way; more may come.
    """

    folder: ResultsFolder
    store: Store
    workshop: Workshop
    watcher: Watcher
    wants_adapters: bool
    should_stop: Callable[[], bool]
    snapshot_seconds: float = SNAPSHOT_SECONDS
    clock: Callable[[], float] = time.monotonic
    since: int | None = None
    num_processes: int = 1
    bars: Mapping[str, Bar] = field(default_factory=dict[str, Bar])

    def train(
        self, group: tuple[Trial, ...], *, calls_for: Callable[[Trial], Sequence[Trial]]
    ) -> Generator[Trial]:
        """Train every trial of the group that can be claimed; yields each when it has its outcome.

        Closed before its end, or ended by whatever is raised, it leaves nothing claimed.

        Args:
            group: trials that one engine can train together.
            calls_for: asked of every trial that has its outcome: further trials that the same
                engine can train, which join those that wait.

        Raises:
            Interrupted: `should_stop` said so.
        """
        left = [group]
        with Heartbeat(self.store) as heart:
            while left:
                together = left.pop(0)
                feed = _StoreFeed(self, together, heart, calls_for)
                try:
                    yield from self._train_together(together, feed)
                finally:
                    feed.release()
                left = [*feed.left, *left]

    def _train_together(self, trials: tuple[Trial, ...], feed: "_StoreFeed") -> Generator[Trial]:
        feed.stop_if_asked()
        try:
            engine = self.workshop.engine(
                trials, num_processes=self.num_processes, remark=self.watcher.remarks
            )
        except Exception as error:  # noqa: BLE001 - it must not cost the other groups
            feed.fail_all(error)
            yield from feed.new_outcomes()
            return
        feed.provenance = self.workshop.provenance(engine.name)
        try:
            with closing(engine.train(feed)) as events:
                for event in events:
                    feed.take(event)
                    yield from feed.new_outcomes()
            feed.stop_if_asked()
            assert not feed.under_way, f"no outcome of {', '.join(feed.under_way)}"
            assert not feed.waits, f"the engine never asked for {', '.join(feed.waits)}"
        except (Interrupted, StoreError):
            raise
        except Exception as error:  # noqa: BLE001 - one failure must not cost other trials
            feed.find_culprit(error)
            yield from feed.new_outcomes()


@dataclass(frozen=True, slots=True)
class _Claimed:
    """A trial under way: its attempt in the store, and when it began by our clock."""

    trial: Trial
    attempt: int
    began: float


class _StoreFeed:
    """An `engine.base.Feed` of trials that are claimed in the store when the engine takes them."""

    def __init__(
        self,
        training: Training,
        trials: Sequence[Trial],
        heart: "Heartbeat",
        calls_for: Callable[[Trial], Sequence[Trial]],
    ) -> None:
        self.provenance: Provenance | None = None
        self.under_way = dict[str, _Claimed]()
        self.waits = {trial.trial_id: trial for trial in trials}
        # Where the engine broke: what is left to train, each part from a feed of its own.
        self.left: tuple[tuple[Trial, ...], ...] = ()
        self._calls_for = calls_for
        self._is_over = False
        self._ended = list[Trial]()
        self._training = training
        self._heart = heart
        # A round of snapshots: who has not offered one yet, None between two rounds.
        self._owing: set[str] | None = None
        self._round_began = self._round_ended = training.clock()
        self._pause = training.snapshot_seconds
        self._stopping = False
        # The engine was to offer snapshots because we stop, and has offered those that it has.
        self._has_offered = False
        self._begun = {path.stem for path in training.folder.snapshots()}
        # Of all of them, whoever trains them: how many had no outcome when that was last asked.
        self._shared = tuple(self.waits)
        self._num_open = 0
        self._counted_at = -math.inf

    # What an engine asks --------------------------------------------------------------------------

    def waiting(self) -> Sequence[Trial]:
        if self._is_asked_to_stop() or self._has_its_share():
            return ()
        return tuple(self.waits.values())

    def claim(self, trial: Trial) -> Work | None:
        training = self._training
        del self.waits[trial.trial_id]
        if not self._claim(trial):
            return None
        training.watcher.trial_begins(trial)
        return Work(trial, self._snapshot_of(trial), training.bars.get(trial.trial_id))

    def _snapshot_of(self, trial: Trial) -> Snapshot | None:
        """What the trial can go on from with this engine, if anything."""
        path = self._training.folder.snapshot(trial.trial_id)
        snapshot = self._training.workshop.load_snapshot(path) if path.is_file() else None
        assert self.provenance is not None
        if snapshot is None or snapshot.engine == self.provenance.engine:
            return snapshot
        self._training.watcher.remarks(
            f"{trial.trial_id} was under way on the {snapshot.engine} engine, whose snapshots the "
            f"{self.provenance.engine} engine can't use: it begins anew"
        )
        return None

    def _has_its_share(self) -> bool:
        """Whether what waits is for other processes to take. One trial can always be taken."""
        training = self._training
        if training.num_processes == 1 or not self.under_way:
            return False
        now = training.clock()
        if now - self._counted_at >= SECONDS_BETWEEN_COUNTS:
            ended = training.store.num_ended(self._shared, since=training.since)
            self._num_open, self._counted_at = len(self._shared) - ended, now
        return len(self.under_way) >= math.ceil(self._num_open / training.num_processes)

    def is_begun(self, trial: Trial) -> bool:
        return trial.trial_id in self._begun

    def wants_snapshot(self) -> bool:
        if self._owing is not None:
            # The engine goes on without a snapshot of some trials: they have nothing to lose.
            self._end_round()
            self._has_offered = self._stopping
        training = self._training
        due = training.clock() - self._round_ended >= self._pause
        if not due and not self._is_asked_to_stop():
            return False
        self._owing = set(self.under_way)
        self._round_began = training.clock()
        return True

    def is_dropped(self, trial_id: str) -> bool:
        claimed = self.under_way.get(trial_id)
        if claimed is None:
            return True  # It has failed here, when its snapshot was to be written.
        if not self._heart.has_lost(claimed.attempt):
            return False
        self._drop(claimed)
        return True

    # What an engine yields ------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """Write down what happened.

        Raises:
            Interrupted: we are to stop, and have what the trials under way can go on from.
        """
        trial_id = event.outcome.trial_id if isinstance(event, Finished) else event.trial_id
        claimed = self.under_way.get(trial_id)
        if claimed is not None:
            try:
                self._take(event, claimed)
            except (Interrupted, StoreError):
                raise
            except Exception as error:  # A full disk, say: it costs this trial alone.
                if trial_id not in self.under_way:
                    raise
                self._end(claimed, self._failure(claimed, error))
        if self._owing is not None:
            self._owing &= set(self.under_way)
            if not self._owing:
                self._end_round()
                self._has_offered = self._stopping
        if self._has_offered and self.under_way:
            self.stop_if_asked()

    def _take(self, event: Event, claimed: _Claimed) -> None:
        training, trial = self._training, claimed.trial
        match event:
            case Progress():
                training.watcher.update(trial, event)
            case NoiseProbe():
                if not training.store.add_noise_probes(claimed.attempt, [event]):
                    self._drop(claimed)
            case Snapshot():
                path = training.folder.snapshot(trial.trial_id)
                training.workshop.save_snapshot(path, event)
                if self._owing is not None:
                    self._owing.discard(trial.trial_id)
            case Finished():
                # The adapter is on disk before its trial is known to be done.
                if event.adapter is not None and training.wants_adapters:
                    self._keep(trial, event.adapter)
                self._end(claimed, event.outcome)
            case Failed():
                self._end(claimed, self._failure(claimed, event.error))

    # What becomes of trials -----------------------------------------------------------------------

    def fail_all(self, error: Exception) -> None:
        """What waits can't be trained: each of the trials has failed."""
        self._is_over = True
        self.provenance = self.provenance or self._training.workshop.provenance("none")
        for trial in tuple(self.waits.values()):
            del self.waits[trial.trial_id]
            if self._claim(trial):
                self._training.watcher.trial_begins(trial)
                claimed = self.under_way[trial.trial_id]
                self._end(claimed, self._failure(claimed, error))

    def find_culprit(self, error: Exception) -> None:
        """The engine broke: record the trial that did it, or say in `left` how to find it."""
        self._is_over = True
        suspects = tuple(claimed.trial for claimed in self.under_way.values())
        if not suspects:  # It broke over the trial that it was about to take, or over none.
            if len(self.waits) == 1:
                self.fail_all(error)
                return
            suspects = tuple(self.waits.values())[:1]
        rest = tuple(trial for trial in self.waits.values() if trial not in suspects)
        if len(self.under_way) == 1:
            (claimed,) = self.under_way.values()
            self._end(claimed, self._failure(claimed, error))
            suspects = ()
        else:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self._training.watcher.remarks(
                f"the engine broke with {len(self.under_way)} trials under way ({said})"
                + ("; each goes on alone, to find the one that did it" if suspects else "")
            )
        self.left = tuple(part for part in (*((one,) for one in suspects), rest) if part)

    def new_outcomes(self) -> Generator[Trial]:
        """The trials that have an outcome since this was last asked; what they call for waits."""
        while self._ended:
            trial = self._ended.pop(0)
            further = tuple(self._calls_for(trial))
            if further and self._is_over:
                self.left = (*self.left, further)
            else:
                self.waits |= {one.trial_id: one for one in further}
            yield trial

    def release(self) -> None:
        """Give back what is claimed, without an outcome."""
        for claimed in tuple(self.under_way.values()):
            self._forget(claimed)
            # Whoever cannot reach the store now leaves claims that expire.
            with suppress(StoreError):
                self._training.store.release(claimed.attempt)

    def stop_if_asked(self) -> None:
        """End here if we are to stop and there is something left to do.

        Raises:
            Interrupted: so it is.
        """
        if (self.waits or self.under_way) and self._is_asked_to_stop():
            raise interrupted(self._training.folder)

    def _claim(self, trial: Trial) -> bool:
        training = self._training
        assert self.provenance is not None
        attempt = training.store.claim(
            trial.trial_id, provenance=self.provenance, since=training.since
        )
        if attempt is None:
            if training.since is None:
                training.watcher.remarks(
                    f"{trial.trial_id} is being trained by another process; passed"
                )
            return False
        self.under_way[trial.trial_id] = _Claimed(trial, attempt, training.clock())
        self._heart.beat_for(attempt)
        return True

    def _end(self, claimed: _Claimed, outcome: Outcome) -> None:
        training, trial = self._training, claimed.trial
        if not training.store.finish(claimed.attempt, outcome):
            self._drop(claimed)
            return
        self._forget(claimed)
        training.folder.snapshot(trial.trial_id).unlink(missing_ok=True)
        self._ended.append(trial)
        training.watcher.trial_ends(trial, outcome)

    def _drop(self, claimed: _Claimed) -> None:
        self._forget(claimed)
        self._training.watcher.remarks(
            f"{claimed.trial.trial_id} was taken over by another process; dropped"
        )

    def _forget(self, claimed: _Claimed) -> None:
        del self.under_way[claimed.trial.trial_id]
        self._heart.forget(claimed.attempt)

    def _keep(self, trial: Trial, adapter: "AdapterFiles") -> None:
        final = self._training.folder.adapter(trial.trial_id)
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        adapter.save(partial)
        replace_folder(partial, final)
        path = str(final.resolve())
        self._training.store.add_artifact(trial.trial_id, kind="adapter", path=path)

    def _failure(self, claimed: _Claimed, error: Exception) -> Outcome:
        return Outcome(
            trial_id=claimed.trial.trial_id,
            status="failed",
            num_updates=0,
            train_loss=None,
            validation_loss=None,
            seconds=self._training.clock() - claimed.began,
            num_tokens=0,
            peak_memory_bytes=None,
            rows_per_microbatch=None,
            reason=" ".join(str(error).split()) or type(error).__name__,
            error="".join(traceback.format_exception(error)),
        )

    def _end_round(self) -> None:
        self._owing = None
        self._round_ended = self._training.clock()
        took = self._round_ended - self._round_began
        self._pause = max(self._training.snapshot_seconds, PAUSE_IN_ROUNDS * took)

    def _is_asked_to_stop(self) -> bool:
        self._stopping = self._stopping or self._training.should_stop()
        return self._stopping


class Heartbeat:
    """Says from a thread of its own that attempts are alive, however long one update takes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._attempts = set[int]()
        self._lost = set[int]()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def beat_for(self, attempt: int) -> None:
        """From now on for this attempt, too."""
        with self._lock:
            self._attempts.add(attempt)

    def forget(self, attempt: int) -> None:
        """No longer for this attempt."""
        with self._lock:
            self._attempts.discard(attempt)
            self._lost.discard(attempt)

    def has_lost(self, attempt: int) -> bool:
        """Whether the store has answered that another process has taken the trial over."""
        with self._lock:
            return attempt in self._lost

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            with self._lock:
                attempts = self._attempts - self._lost
            if not attempts:
                continue
            # A store that can't be reached now may be reached again before the claims expire.
            with suppress(StoreError):
                ended = self._store.heartbeat(attempts)
                with self._lock:  # What was ended by ourselves meanwhile is nothing lost.
                    self._lost |= ended & self._attempts

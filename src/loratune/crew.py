"""Several processes of one machine train one plan from one store, each on a device of its own.

The parent trains nothing: it starts a process for each device, hands on what they report, and waits
for their end. The work needs no dividing, since each process claims a trial when it has room for
one, and holds no more than its share of those that are still open. Nothing is shared but the store
and the results folder. No queue and no lock either: a process that is killed while it holds one
would stop all others. Each has a pipe to the parent, and the end of the pipe says that the other
side is gone: processes whose parent was killed stop with snapshots.

The others pass by what a process has claimed. If it is killed, new processes take that over when
all have ended. What it had begun is suspected of having killed it (memory, say) and is then trained
last, each trial alone; a trial that ends two processes alone is given up by this sweep.

What it does not do: settle cells, and reach another machine.
"""

import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

from loratune.engine.base import Progress
from loratune.errors import LoratuneError
from loratune.folder import ResultsFolder
from loratune.planning.bar import Bar
from loratune.planning.build import Plan
from loratune.records import FINAL_STATUSES, Outcome, Score, Trial
from loratune.store.database import Store, open_store
from loratune.training import Interrupted, Training, Watcher, Workshop, interrupted

# How often updates are reported, and how often the parent asks whether it is to stop.
SECONDS_BETWEEN_REPORTS = 0.1
# So often a process may end while it trains one trial alone: once can be anybody's doing.
STRIKES = 2


@dataclass(frozen=True, slots=True)
class CrewMember:
    """One process: its name in messages, and what makes its workshop there; it is pickled."""

    name: str
    make_workshop: Callable[[], Workshop]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What every process of a crew is told.

    `since` is the store's newest attempt before them; `bars` say what stops a trial half-way, by
    trial id; `suspects` are trained last, each alone; `num_processes` is how many are told so.
    """

    study: str
    folder: ResultsFolder
    trials: tuple[Trial, ...]
    wants_adapters: bool
    snapshot_seconds: float
    since: int
    bars: Mapping[str, Bar] = field(default_factory=dict[str, Bar])
    suspects: tuple[Trial, ...] = ()
    num_processes: int = 1


def train_in_crew(
    members: Sequence[CrewMember],
    assignment: Assignment,
    *,
    store: Store,
    watcher: Watcher,
    should_stop: Callable[[], bool],
) -> Generator[Trial]:
    """Train the trials in a process for each member; yields each when it has its outcome.

    Closed before its end, it kills the processes; what they had claimed can be claimed at once.

    Raises:
        Interrupted: `should_stop` said so.
    """
    left, suspects, strikes = assignment.trials, set[str](), Counter[str]()
    while left:
        present = members[: len(left)]
        told = replace(
            assignment,
            num_processes=len(present),
            trials=tuple(trial for trial in left if trial.trial_id not in suspects),
            suspects=tuple(trial for trial in left if trial.trial_id in suspects),
        )
        crew = _Crew(present, told, watcher, should_stop)
        yield from crew.train()
        left = _open_trials(store, assignment.study, crew.not_ended())
        if left and crew.is_stopping:
            raise interrupted(assignment.folder)
        if not crew.lost:
            return
        for begun in crew.lost:
            suspects |= begun
            if len(begun) == 1:
                strikes.update(begun)
        for trial in left:
            if strikes[trial.trial_id] >= STRIKES:
                watcher.remarks(
                    f"{trial.trial_id} ended {STRIKES} processes; given up until the next run"
                )
        left = tuple(trial for trial in left if strikes[trial.trial_id] < STRIKES)
        if not crew.num_ended and not any(crew.lost):
            return  # They end before they begin anything, and would do so again.


def _open_trials(store: Store, study: str, trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Those of the trials that have no final outcome and that nobody trains."""
    results = store.results(
        study, trial_ids=[trial.trial_id for trial in trials], with_losses=False
    )
    done = (*FINAL_STATUSES, "running")
    return tuple(result.trial for result in results if result.status not in done)


# The parent ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TrialBegins:
    trial_id: str


@dataclass(frozen=True, slots=True)
class _TrialEnds:
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _Remark:
    text: str


@dataclass(frozen=True, slots=True)
class _Leaves:
    """The process ends as it should: nothing was left, or it was told to stop."""


_Message = Progress | _TrialBegins | _TrialEnds | _Remark | _Leaves


@dataclass
class _Member:
    name: str
    process: BaseProcess
    pipe: Connection
    under_way: set[str] = field(default_factory=set[str])
    leaves: bool = False


class _Crew:
    """One process for each member, from their start to their end."""

    def __init__(
        self,
        members: Sequence[CrewMember],
        assignment: Assignment,
        watcher: Watcher,
        should_stop: Callable[[], bool],
    ) -> None:
        self.is_stopping = False
        # What each process that ended early had begun.
        self.lost = list[frozenset[str]]()
        self._members = members
        self._assignment = assignment
        self._watcher = watcher
        self._should_stop = should_stop
        trials = (*assignment.trials, *assignment.suspects)
        self._trials = {trial.trial_id: trial for trial in trials}
        self._ended = set[str]()

    @property
    def num_ended(self) -> int:
        """The trials of which an outcome was reported."""
        return len(self._ended)

    def not_ended(self) -> tuple[Trial, ...]:
        """The others."""
        return tuple(trial for name, trial in self._trials.items() if name not in self._ended)

    def train(self) -> Generator[Trial]:
        present = list[_Member]()
        try:
            for member in self._members:
                present.append(self._start(member))
            while present:
                if not self.is_stopping and self._should_stop():
                    self.is_stopping = True
                    for member in present:
                        _tell_to_stop(member.pipe)
                ready = wait([one.pipe for one in present], timeout=SECONDS_BETWEEN_REPORTS)
                for member in [one for one in present if one.pipe in ready]:
                    messages = _received(member.pipe)
                    if messages is None:
                        present.remove(member)
                        self._see_off(member)
                        continue
                    for message in messages:
                        yield from self._take(message, member)
        finally:
            for member in present:
                member.process.kill()
                member.process.join()
                member.pipe.close()

    def _start(self, member: CrewMember) -> _Member:
        context = get_context("spawn")  # A fork would take CUDA and open databases along.
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(member.make_workshop, self._assignment, theirs), name=member.name
        )
        with _ctrl_c_ignored():
            process.start()
        theirs.close()
        return _Member(member.name, process, ours)

    def _take(self, message: _Message, member: _Member) -> Generator[Trial]:
        match message:
            case Progress():
                self._watcher.update(self._trials[message.trial_id], message)
            case _TrialBegins():
                member.under_way.add(message.trial_id)
                self._watcher.trial_begins(self._trials[message.trial_id])
            case _TrialEnds():
                trial = self._trials[message.outcome.trial_id]
                self._ended.add(trial.trial_id)
                member.under_way.discard(trial.trial_id)
                self._watcher.trial_ends(trial, message.outcome)
                yield trial
            case _Remark():
                self._watcher.remarks(message.text)
            case _Leaves():
                member.leaves = True

    def _see_off(self, member: _Member) -> None:
        member.process.join()
        member.pipe.close()
        if not member.leaves:
            self.lost.append(frozenset(member.under_way))
            code = member.process.exitcode
            how = f"killed by signal {-code}" if code is not None and code < 0 else f"code {code}"
            self._watcher.remarks(
                f"the process on {member.name} ended early ({how}); its "
                f"{len(member.under_way)} trials under way go on when the others are done"
            )


def _tell_to_stop(pipe: Connection) -> None:
    with suppress(OSError):  # It has ended; the end of its pipe says so.
        pipe.send("stop")


def _received(pipe: Connection) -> list[_Message] | None:
    """The next messages; None where the process is gone, in the middle of one perhaps."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


@contextmanager
def _ctrl_c_ignored() -> Generator[None]:
    """What is started meanwhile ignores Ctrl-C from its first instant: it is meant for the parent.

    A terminal sends it to all processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# A process of the crew ----------------------------------------------------------------------------


def _work(make_workshop: Callable[[], Workshop], assignment: Assignment, pipe: Connection) -> None:
    """All that a process of the crew does."""
    parent = _Parent(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, parent.stop)
    try:
        workshop = make_workshop()
        with open_store(assignment.folder.address(), create=False) as store:
            training = Training(
                folder=assignment.folder,
                store=store,
                workshop=workshop,
                watcher=parent,
                wants_adapters=assignment.wants_adapters,
                should_stop=parent.is_to_stop,
                snapshot_seconds=assignment.snapshot_seconds,
                since=assignment.since,
                num_processes=assignment.num_processes,
                bars=assignment.bars,
            )
            alone = ((trial,) for trial in assignment.suspects)
            for group in (*workshop.groups(assignment.trials), *alone):
                # What outcomes call for is the parent's to say, and for another crew to train.
                for _ in training.train(group, calls_for=lambda _: ()):
                    pass  # It was reported.
    except Interrupted:
        pass
    except LoratuneError as error:
        parent.remarks(str(error))
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - the parent says it, between its own lines
        parent.remarks("".join(traceback.format_exception(error)))
        sys.exit(1)
    parent.leave()


class _Parent:
    """The parent as a process of the crew sees it: a `training.Watcher` that says when to stop."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._stopping = False
        self._unsent = list[_Message]()
        self._sent_at = time.monotonic()

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """A handler of signals: stop, whatever the parent says."""
        self._stopping = True

    def is_to_stop(self) -> bool:
        """Whether the parent has said so, or is gone."""
        if not self._stopping:
            try:
                self._stopping = self._pipe.poll()  # There is one message only, and the end.
            except OSError:
                self._stopping = True
        return self._stopping

    def leave(self) -> None:
        """The last word."""
        self._send(_Leaves())

    def begins(self, plan: Plan, *, finished: frozenset[str]) -> None:
        raise AssertionError("the parent begins the sweep")

    def plans_more(self, trials: Sequence[Trial]) -> None:
        raise AssertionError("the parent plans")

    def trial_begins(self, trial: Trial) -> None:
        self._send(_TrialBegins(trial.trial_id))

    def update(self, trial: Trial, progress: Progress) -> None:
        self._unsent.append(progress)
        if time.monotonic() - self._sent_at >= SECONDS_BETWEEN_REPORTS:
            self._send()

    def trial_ends(self, trial: Trial, outcome: Outcome) -> None:
        # A number for each update is in the store already.
        self._send(_TrialEnds(replace(outcome, losses=(), grad_norms=())))

    def scored(self, trial: Trial, score: Score) -> None:
        raise AssertionError("the parent scores")

    def remarks(self, text: str) -> None:
        self._send(_Remark(text))

    def _send(self, *messages: _Message) -> None:
        unsent, self._unsent = [*self._unsent, *messages], []
        self._sent_at = time.monotonic()
        try:
            self._pipe.send(unsent)
        except OSError:
            self._stopping = True  # The parent is gone.

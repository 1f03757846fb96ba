"""A sweep without torch: a stub engine whose numbers are a pure function of the trial.

Run as a program it is one `run` of a small study in the folder named, as a process that can be
killed: `python stub_sweep.py DIR SECONDS_PER_UPDATE one|pack [NUM_PROCESSES]`.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from loratune.crew import CrewMember
from loratune.engine.base import Event, Failed, Feed, Finished, Progress, Snapshot, Work
from loratune.planning.build import Plan, make_plan
from loratune.planning.cost import H100
from loratune.planning.shapes import declared_model_facts
from loratune.records import (
    DataFacts,
    DataSummary,
    NotScored,
    Outcome,
    Prediction,
    Provenance,
    QuestionSet,
    Said,
    Score,
    Scored,
    ScoreKey,
    ToScore,
    Trial,
)
from loratune.study.identity import cell_key
from loratune.study.loading import LoadedStudy, parse_study
from loratune.study.schema import DeclaredModel
from loratune.sweep import Sweep, run_sweep

STUDY = """\
study: {name}
model: stub
precision: float32
data: {{train: rows.jsonl, prompt: q, response: a, max_tokens: 64, validation: {{rows: 8}}}}
protocol: {{kind: fixed_samples, epochs: 1}}
methods: [lora, pissa]
rank: 4
alpha: rank
targets: all-linear
batch_size: {batch_size}
learning_rate: [1e-3, 1e-2]
seeds: 2
schedule: {{kind: cosine}}
{more}
"""


def stub_study(name: str = "stub", *, batch_size: str = "[8, 16]", more: str = "") -> LoadedStudy:
    text = STUDY.format(name=name, batch_size=batch_size, more=more)
    return parse_study(text, name="stub.yaml", folder=Path.cwd())


def growing_study(more: str = "") -> LoadedStudy:
    """Two methods at two batch sizes whose best LR may be anywhere: the stub draws its losses."""
    text = STUDY.format(name="growing", batch_size="[8, 16]", more=more)
    text = text.replace(
        "learning_rate: [1e-3, 1e-2]", "learning_rate: {values: [1e-3, 1e-2], extend: 2}"
    ).replace("seeds: 2", "seeds: {grid: 1, around_best: 2, confirm: 2}")
    return parse_study(text, name="growing.yaml", folder=Path.cwd())


def searching_study(more: str = "") -> LoadedStudy:
    """Two methods, each searched over two batch sizes; the stub draws its losses."""
    text = STUDY.format(name="searching", batch_size="[8, 16]", more=more)
    text = text.replace(
        "learning_rate: [1e-3, 1e-2]",
        "learning_rate: {search: adaptive, low: 1e-4, high: 1e-2, max_trials: 13, "
        "trials_per_round: 3}",
    ).replace("seeds: 2", "seeds: {grid: 3, confirm: 2}")
    return parse_study(text, name="searching.yaml", folder=Path.cwd())


@dataclass(frozen=True)
class StubAdapter:
    text: str

    def save(self, folder: Path) -> None:
        (folder / "adapter.txt").write_text(self.text)


def number(trial: Trial, what: str) -> float:
    digest = hashlib.sha256(f"{trial.trial_id}:{what}".encode()).digest()
    return 1.0 + int.from_bytes(digest[:4], "big") / 2**32


def stub_loss_at(trial: Trial, update: int) -> float:
    """A training loss."""
    return number(trial, str(update))


def never(*_: object) -> bool:
    return False


def drawn_loss(trial: Trial) -> float:
    return number(trial, "validation")


@dataclass
class StubEngine:
    """Trains one trial after another."""

    name: str = "one"
    num_at_once: int = 1
    seconds_per_update: float = 0.0
    trained: list[str] = field(default_factory=list)
    fails: Callable[[Trial], bool] = never
    loss: Callable[[Trial], float] = drawn_loss

    def train(self, feed: Feed) -> Generator[Event]:
        while waiting := feed.waiting():
            work = feed.claim(waiting[0])
            if work is not None:
                yield from self._train(work, feed)

    def _train(self, work: Work, feed: Feed) -> Generator[Event]:
        trial = work.trial
        self.trained.append(trial.trial_id)
        first = work.snapshot.update if work.snapshot is not None else 0
        for update in range(first, trial.num_updates):
            time.sleep(self.seconds_per_update)
            if self.fails(trial):
                raise RuntimeError("the stub broke")
            yield Progress(trial.trial_id, update, trial.batch_size, number(trial, str(update)))
            stopped = stub_stopped(work, update)
            if stopped is not None:
                yield stopped
                return
            if feed.is_dropped(trial.trial_id):
                return
            if feed.wants_snapshot():
                yield Snapshot(trial.trial_id, update + 1, {}, {}, self.name)
        yield stub_finished(trial, self.loss(trial))


@dataclass
class StubPack(StubEngine):
    """Trains up to `seats` trials at once, an update of each in turn.

    `breaks` is asked before each step of the pack: an engine that falls over with all its trials.
    `most` is how many trials were under way at most; a trial that `fails` can't be begun.
    """

    name: str = "pack"
    num_at_once: int = 5
    seats: int = 5
    breaks: Callable[[Trial, int], bool] = never
    most: int = 0

    def train(self, feed: Feed) -> Generator[Event]:
        seated = dict[str, tuple[Trial, int]]()
        works = dict[str, Work]()
        while True:
            while len(seated) < self.seats and (waiting := feed.waiting()):
                # The longest first, not the plan's order.
                work = feed.claim(max(waiting, key=lambda trial: trial.num_updates))
                if work is None:
                    continue
                trial = work.trial
                works[trial.trial_id] = work
                self.trained.append(trial.trial_id)
                if self.fails(trial):
                    yield Failed(trial.trial_id, RuntimeError("the stub broke"))
                    continue
                seated[trial.trial_id] = (trial, work.snapshot.update if work.snapshot else 0)
            self.most = max(self.most, len(seated))
            if not seated:
                return
            time.sleep(self.seconds_per_update)
            for trial, update in seated.values():
                if self.breaks(trial, update):
                    raise RuntimeError("the pack broke")
            for trial, update in tuple(seated.values()):
                yield Progress(trial.trial_id, update, trial.batch_size, number(trial, str(update)))
                seated[trial.trial_id] = (trial, update + 1)
                stopped = stub_stopped(works[trial.trial_id], update)
                if feed.is_dropped(trial.trial_id):
                    del seated[trial.trial_id]
                elif stopped is not None:
                    del seated[trial.trial_id]
                    yield stopped
                elif update + 1 == trial.num_updates:
                    del seated[trial.trial_id]
                    yield stub_finished(trial, self.loss(trial))
            if feed.wants_snapshot():
                for trial, update in tuple(seated.values()):
                    yield Snapshot(trial.trial_id, update, {}, {}, self.name)


STUBS = {"one": StubEngine, "pack": StubPack}


def stub_finished(trial: Trial, loss: float) -> Finished:
    adapter: Any = StubAdapter(trial.trial_id)
    return Finished(replace(stub_outcome(trial), validation_loss=loss), adapter)


def stub_stopped(work: Work, update: int) -> Finished | None:
    """What ends a trial below its bar with this update."""
    whole = stub_outcome(work.trial)
    losses = whole.losses[: update + 1]
    reason = None if work.bar is None else work.bar.reason_after(losses)
    if reason is None:
        return None
    outcome = replace(
        whole,
        status="stopped",
        num_updates=len(losses),
        train_loss=None,
        validation_loss=None,
        losses=losses,
        stopped_at_update=update,
        reason=reason,
    )
    return Finished(outcome, None)


def stub_outcome(trial: Trial) -> Outcome:
    return Outcome(
        trial_id=trial.trial_id,
        status="done",
        num_updates=trial.num_updates,
        train_loss=number(trial, "train"),
        validation_loss=number(trial, "validation"),
        seconds=1.0,
        num_tokens=trial.num_samples * 10,
        peak_memory_bytes=None,
        rows_per_microbatch=4,
        losses=tuple(stub_loss_at(trial, update) for update in range(trial.num_updates)),
    )


@dataclass
class StubWorkshop:
    """`training.Workshop` without a model: shapes are made up, snapshots are small text files.

    `kind` is the stub of workshops that are given none.
    """

    kind: ClassVar[str] = "one"
    loaded: LoadedStudy
    stub: StubEngine = field(default_factory=lambda: STUBS[StubWorkshop.kind]())
    scored: list[tuple[str, str]] = field(default_factory=list)
    at_once: list[int] = field(default_factory=list)

    def plan(self) -> Plan:
        shape = DeclaredModel(
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=128,
        )
        names = self.loaded.study.model
        data = DataFacts("data-stub", 64, 8, 640, 6400, 320, 16)
        return make_plan(
            self.loaded.study,
            models={
                name: replace(declared_model_facts(name, shape), provisional=False)
                for name in names
            },
            data={(name, None): data for name in names},
            rate=H100,
        )

    def data_summaries(self) -> Mapping[str, DataSummary]:
        return {"data-stub": DataSummary("stub", 72, 0, 0, 8, 8, 0, 64, 0)}

    def remarks(self) -> tuple[str, ...]:
        return ()

    def provenance(self, engine: str) -> Provenance:
        import os
        import socket

        return Provenance(engine, "none", (), None, socket.gethostname(), os.getpid())

    def groups(self, trials: Sequence[Trial]) -> tuple[tuple[Trial, ...], ...]:
        if isinstance(self.stub, StubPack):
            return (tuple(trials),) if trials else ()
        return tuple(tuple(cell) for _, cell in groupby(trials, key=cell_key))

    def engine(
        self, group: Sequence[Trial], *, num_processes: int, remark: Callable[[str], None]
    ) -> StubEngine:
        return self.stub

    def asks(self, trial: Trial, *, task: str) -> ScoreKey:
        return ScoreKey(task, "1", "strict", "greedy")

    def questions(self, trial: Trial, *, task: str) -> QuestionSet:
        return QuestionSet(task, "1", "greedy", "test", ("1",) * 100)

    def score(
        self, wanted: Sequence[ToScore], *, remark: Callable[[str], None]
    ) -> Generator[Said | Scored | NotScored]:
        self.at_once.append(len(wanted))
        for index, one in enumerate(wanted):
            try:
                score, answers = self.score_one(one.trial, one.adapter, task=one.task)
            except RuntimeError as error:
                yield NotScored(index, str(error))
            else:
                yield Scored(index, score, answers)

    def score_one(
        self, trial: Trial, adapter: Path, *, task: str
    ) -> tuple[Score, tuple[Prediction, ...]]:
        assert (adapter / "adapter.txt").read_text() == trial.trial_id
        self.scored.append((trial.trial_id, task))
        right = round(number(trial, task) * 50)  # of 100
        split: Any = "validation" if task == "validation" else "test"
        score = Score(task, "1", "strict", "greedy", split, right, 100 - right, 0, 0)
        verdicts: list[Any] = ["correct"] * right + ["wrong"] * (100 - right)
        answers = (Prediction(index, "an answer", 2, said) for index, said in enumerate(verdicts))
        return score, tuple(answers)

    def save_snapshot(self, path: Path, snapshot: Snapshot) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(f"{snapshot.trial_id} {snapshot.update} {snapshot.engine}")
        partial.replace(path)

    def load_snapshot(self, path: Path) -> Snapshot | None:
        trial_id, update, engine = path.read_text().split()
        return Snapshot(trial_id, int(update), {}, {}, engine)


class Silent:
    """A `training.Watcher` that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begins(self, plan: Plan, *, finished: frozenset[str]) -> None:
        self.told.append(f"{len(finished)} of {len(plan.trials)}")

    def plans_more(self, trials: Sequence[Trial]) -> None:
        self.told.append(f"{len(trials)} more")

    def trial_begins(self, trial: Trial) -> None: ...

    def update(self, trial: Trial, progress: Progress) -> None: ...

    def trial_ends(self, trial: Trial, outcome: Outcome) -> None: ...

    def scored(self, trial: Trial, score: Score) -> None: ...

    def remarks(self, text: str) -> None:
        self.told.append(text)


def sweep_stub(
    out: Path,
    loaded: LoadedStudy | None = None,
    *,
    workshop: StubWorkshop | None = None,
    watcher: Silent | None = None,
    **options: Any,
) -> Sweep:
    loaded = loaded or stub_study()
    return run_sweep(
        loaded,
        out=out,
        workshop=workshop or StubWorkshop(loaded),
        watcher=watcher or Silent(),
        **options,
    )


def make_stub(loaded: LoadedStudy, stub: StubEngine) -> StubWorkshop:
    return StubWorkshop(loaded, stub)


def stub_crew(loaded: LoadedStudy, *stubs: StubEngine) -> list[CrewMember]:
    """A process for each stub."""
    return [
        CrewMember(f"stub {index}", partial(make_stub, loaded, stub))
        for index, stub in enumerate(stubs)
    ]


if __name__ == "__main__":
    study = stub_study()
    made = STUBS[sys.argv[3]](seconds_per_update=float(sys.argv[2]))
    sweep_stub(
        Path(sys.argv[1]),
        study,
        workshop=StubWorkshop(study, made),
        snapshot_seconds=0.0,
        crew=stub_crew(study, *[made] * int(sys.argv[4])) if len(sys.argv) > 4 else (),
    )

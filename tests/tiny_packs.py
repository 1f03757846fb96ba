"""Trials on the packed engine, and what it was handed on the way. For tests only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from feeds import ListFeed
from loratune.data.prepare import PreparedData
from loratune.engine import packed as packed_module
from loratune.engine.base import Event, Failed, Finished, Progress, Snapshot
from loratune.engine.laying import StepRows
from loratune.engine.packed import PackedEngine
from loratune.engine.packed_model import PackedModel
from loratune.engine.slots import from_row
from loratune.methods.base import LayerTensors
from loratune.models.load import Base
from loratune.planning.bar import Bar
from loratune.planning.packing import PackShape
from loratune.records import Trial
from loratune.study.methods import describe
from tiny_trials import tiny_base, tiny_trial

PACKABLE = ("lora", "rslora", "loraplus", "dora", "pissa", "milora", "olora")
CORRECTED = ("pissa", "milora", "olora")


def shape_for(
    trials: Sequence[Trial], *, num_slots: int = 4, tokens_per_step: int = 96, **changes: Any
) -> PackShape:
    """What these trials need; small enough that most batches are spread over several steps."""
    shape = PackShape(
        num_slots=num_slots,
        tokens_per_step=tokens_per_step,
        rank=max(trial.rank for trial in trials),
        corrected=any(trial.method.name in CORRECTED for trial in trials),
        magnitudes=any(trial.method.name == "dora" for trial in trials),
        dropout=any(trial.dropout > 0 for trial in trials),
    )
    return replace(shape, **changes)


@dataclass
class Packed:
    """What came of a pack: every event in order, and the last one of each trial."""

    events: list[Event] = field(default_factory=list[Event])

    def finished(self, trial_id: str) -> Finished:
        found = [e for e in self.events if isinstance(e, Finished)]
        return next(one for one in found if one.outcome.trial_id == trial_id)

    def failed(self) -> dict[str, Exception]:
        return {e.trial_id: e.error for e in self.events if isinstance(e, Failed)}

    def ends(self) -> list[str]:
        """The trials that came to an end, each as often as it did."""
        return [
            one.outcome.trial_id if isinstance(one, Finished) else one.trial_id
            for one in self.events
            if isinstance(one, Finished | Failed)
        ]

    def snapshots(self) -> list[Snapshot]:
        return [e for e in self.events if isinstance(e, Snapshot)]

    def progress(self, trial_id: str) -> list[Progress]:
        return [e for e in self.events if isinstance(e, Progress) and e.trial_id == trial_id]


def pack(
    trials: Sequence[Trial],
    data: Sequence[PreparedData],
    *,
    base: Base | None = None,
    shape: PackShape | None = None,
    snapshots: Mapping[str, Snapshot | None] | None = None,
    wants: Callable[[], bool] = lambda: False,
    drops: Callable[[str], bool] = lambda trial_id: False,
    bars: Mapping[str, Bar] | None = None,
    targets: Sequence[str] = ("all-linear",),
    **engine: Any,
) -> Packed:
    """All trials on one packed engine, to their ends."""
    made = PackedEngine(
        base or tiny_base(),
        {one.facts.fingerprint: one for one in data},
        shape=shape or shape_for(trials),
        targets=targets,
        **engine,
    )
    feed = ListFeed(trials, snapshots or {}, wants=wants, drops=drops, bars=bars or {})
    return Packed(list(made.train(feed)))


def mixed_trials(small: PreparedData, large: PreparedData) -> list[Trial]:
    """Every packable method, and all that may differ between trials of a pack does.

    Learning rates are such that training is not chaotic. Every trial makes 20 updates at least.
    """

    def one(name: str, data: PreparedData, **changes: Any) -> Trial:
        method = changes.pop("method", name)
        return replace(tiny_trial(data, method=method, **changes), trial_id=name)

    return [
        one("lora", large, rank=4, batch_size=2, warmup_steps=3, learning_rate=1e-3),
        one(
            "rslora",
            large,
            rank=3,
            batch_size=7,
            steps=20,
            schedule="linear",
            seed=1,
            max_grad_norm=0.1,
            learning_rate=1e-3,
        ),
        one(
            "loraplus",
            small,
            rank=2,
            batch_size=3,
            epochs=3.0,
            schedule="constant",
            seed=2,
            weight_decay=0.1,
            learning_rate=2e-4,
        ),
        one("dora", small, rank=2, batch_size=8, steps=20, seed=1, learning_rate=2e-3),
        one("pissa", large, rank=4, batch_size=16, steps=21, weight_decay=0.3, learning_rate=5e-4),
        one(
            "milora",
            small,
            rank=1,
            batch_size=5,
            epochs=5.0,
            seed=3,
            max_grad_norm=0.05,
            beta2=0.95,
            learning_rate=1e-3,
        ),
        one("olora", large, rank=3, batch_size=4, epochs=2.0, alpha=3.0, learning_rate=1e-3),
        one("whole", large, method="lora", rank=4, batch_size=40, steps=20, learning_rate=3e-3),
        one("dora2", large, method="dora", rank=4, batch_size=4, steps=25, learning_rate=1e-3),
    ]


def rescaled(trial: Trial, **changes: Any) -> Trial:
    """The trial with other values, its scale worked out again."""
    other = replace(trial, **changes)
    scale = describe(other.method.name).scale_of(rank=other.rank, alpha=other.alpha)
    return replace(other, scale=scale)


@dataclass
class Steps:
    """What a packed engine handed to its model and optimizer, trial by trial."""

    rows: list[tuple[StepRows, dict[int, str]]] = field(default_factory=list[Any])
    starts: dict[str, dict[str, LayerTensors]] = field(default_factory=dict[str, Any])
    gradients: dict[str, list[dict[str, LayerTensors]]] = field(default_factory=dict[str, Any])

    def of(self, trial_id: str) -> list[tuple[bytes, int]]:
        """Token ids and dropout key of every row of a trial, in order."""
        found = list[tuple[bytes, int]]()
        for step, names in self.rows:
            for index, slot in enumerate(step.slots.tolist()):
                if names[slot] == trial_id:
                    found.append((step.rows.row(index)[0].tobytes(), int(step.keys[index])))
        return found

    def num_steps(self, trial_id: str) -> int:
        """Steps in which a trial took part."""
        return sum(
            trial_id in {names[slot] for slot in step.slots.tolist()} for step, names in self.rows
        )


def spied(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Notes every trial's start, every step's rows and every update's gradient from here on."""
    steps = Steps()
    sessions = list[Any]()
    launch, train_step = packed_module._Session._launch, PackedModel.train_step
    update_rows, put = packed_module.update_rows, packed_module._Session._seat

    def own(session: Any, seat: Any, row_P: torch.Tensor) -> dict[str, LayerTensors]:
        return from_row(
            row_P,
            session.slots.layout,
            rank=seat.trial.rank,
            frozen_P=seat.frozen_P,
            magnitudes=seat.has_magnitudes,
        )

    def noted_seat(session: Any, work: Any) -> None:
        put(session, work)
        (seat,) = [one for one in session.seats.values() if one.trial is work.trial]
        row_P = session.slots.params_AP[seat.slot]
        steps.starts.setdefault(work.trial.trial_id, own(session, seat, row_P))

    def noted_launch(session: Any) -> bool:
        sessions[:] = [session]
        return launch(session)

    def noted_step(model: PackedModel, rows: StepRows, **more: Any) -> None:
        names = {slot: seat.trial.trial_id for slot, seat in sessions[0].seats.items()}
        steps.rows.append((rows, names))
        train_step(model, rows, **more)

    def noted_update(slots: Any, updates: Any) -> torch.Tensor:
        for one in updates:
            seat = sessions[0].seats[one.slot]
            layers = own(sessions[0], seat, slots.grads_AP[one.slot])
            steps.gradients.setdefault(seat.trial.trial_id, []).append(layers)
        return update_rows(slots, updates)

    monkeypatch.setattr(packed_module._Session, "_seat", noted_seat)
    monkeypatch.setattr(packed_module._Session, "_launch", noted_launch)
    monkeypatch.setattr(PackedModel, "train_step", noted_step)
    monkeypatch.setattr(packed_module, "update_rows", noted_update)
    return steps

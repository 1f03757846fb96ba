"""The packed engine against the reference engine, against itself among others, and interrupted.

Tolerances. Both engines compute in float32 and sum in other orders, so that one number differs by a
few units of 6e-8. Learning rates here are such that training is not chaotic: what is off in the
last loss is no more than in the first. Measured over 20 to 25 updates, relative: losses up to 2e-7,
gradient norms 5e-7, validation losses 1e-7, first gradients 8e-7; weights, relative to the way that
they have moved, mostly 2e-6, and 3e-5 in one trial (where a gradient is nearly zero, the direction
of its Adam step is rounding). What is promised is 1e-4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.data.order import row_order
from loratune.engine.base import Finished, Snapshot
from loratune.engine.snapshot import load_snapshot, save_snapshot
from loratune.methods import attach_files, load_method
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.base import LayerTensors
from loratune.models.load import Base
from loratune.models.targets import target_modules
from loratune.planning.packing import PackShape
from loratune.records import Outcome, Trial
from tiny_packs import PACKABLE, Packed, Steps, mixed_trials, pack, shape_for, spied
from tiny_trials import random_data, tiny_base, tiny_trial, train

PROMISED = 1e-4
# The measured figures of all but the weights, times four.
SAME_NUMBERS = 3e-6

SMALL, LARGE = random_data(24, seed=5), random_data(40)
DATA = {one.facts.fingerprint: one for one in (SMALL, LARGE)}
TRIALS = mixed_trials(SMALL, LARGE)


# Packed equals reference --------------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    """One pack of all trials, and each of them alone on the reference engine."""

    base: Base
    packed: Packed
    steps: Steps
    reference: Mapping[str, tuple[Outcome, AdapterFiles, dict[str, LayerTensors]]]


def train_both(family: str) -> Both:
    base = tiny_base(family)
    with pytest.MonkeyPatch.context() as patch:
        steps = spied(patch)
        packed = pack(TRIALS, [SMALL, LARGE], base=base)
    reference = dict[str, Any]()
    for trial in TRIALS:
        recorder = FirstGradients(load_method(trial.method.name))
        outcome, adapter = train(
            trial,
            DATA[trial.data_fingerprint],
            base=base,
            tokens_per_microbatch=200,
            find_method=lambda _, recorder=recorder: recorder,
        )
        assert adapter is not None, outcome.reason
        # The engine clips in place; the pack's gradients are looked at before that.
        limit, norm = trial.max_grad_norm, outcome.grad_norms[0]
        clipped = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        found = {name: gradient / clipped for name, gradient in recorder.gradients.items()}
        reference[trial.trial_id] = outcome, adapter, found
    return Both(base, packed, steps, reference)


@dataclass
class FirstGradients:
    """A method that notes every gradient of the first update, by PEFT's names."""

    inner: Any

    def attach(self, model: Any, trial: Trial, *, targets: Sequence[str]) -> Any:
        attached = self.inner.attach(model, trial, targets=targets)
        note = attached.after_backward

        def after_backward(update: int) -> None:
            if update == 0:
                self.gradients = {
                    name.replace(".default", ""): parameter.grad.clone()
                    for name, parameter in attached.model.named_parameters()
                    if parameter.grad is not None
                }
            note(update)

        attached.after_backward = after_backward
        return attached


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_packed_equals_reference_in_every_number_and_in_the_format_of_its_adapters(family):
    # One test a family: its training is the slow part.
    both = train_both(family)
    assert_covers_what_may_differ_between_trials(both)
    assert_equal_numbers(both)
    assert_equal_formats_and_logits(both)


def assert_covers_what_may_differ_between_trials(both: Both) -> None:
    finished = [both.packed.finished(trial.trial_id) for trial in TRIALS]
    assert {one.outcome.status for one in finished} == {"done"}
    assert {trial.method.name for trial in TRIALS} == set(PACKABLE)
    for field, fewest in {
        "rank": 4,
        "batch_size": 7,
        "schedule": 3,
        "learning_rate": 5,
        "seed": 4,
        "protocol": 2,
        "num_train_rows": 2,
        "max_grad_norm": 3,
        "weight_decay": 3,
        "beta2": 2,
        "warmup_steps": 2,
    }.items():
        assert len({getattr(trial, field) for trial in TRIALS}) >= fewest, field
    assert min(trial.num_updates for trial in TRIALS) >= 20
    # Clipping binds, or it is not tested.
    for trial in TRIALS:
        if trial.max_grad_norm is not None:
            norms = both.packed.finished(trial.trial_id).outcome.grad_norms
            assert max(norms) > trial.max_grad_norm
    # Large batches are spread over several steps, and no step holds one trial alone.
    for trial_id in ("whole", "pissa"):
        trial = next(one for one in TRIALS if one.trial_id == trial_id)
        assert both.steps.num_steps(trial_id) >= 1.5 * trial.num_updates
    assert max(len(set(step.slots.tolist())) for step, _ in both.steps.rows) == 4


def assert_equal_numbers(both: Both) -> None:
    for trial in TRIALS:
        reference, adapter, gradients = both.reference[trial.trial_id]
        finished = both.packed.finished(trial.trial_id)
        packed = finished.outcome
        assert packed.num_updates == trial.num_updates == reference.num_updates
        assert packed.num_tokens == reference.num_tokens
        first = by_peft_names(both.steps.gradients[trial.trial_id][0])
        assert first.keys() == gradients.keys()
        assert finished.adapter is not None
        way = distance(started(both.base, trial).tensors, adapter.tensors)
        errors = {
            "losses": furthest(packed.losses, reference.losses),
            "gradient norms": furthest(packed.grad_norms, reference.grad_norms),
            "train loss": furthest([packed.train_loss], [reference.train_loss]),
            "validation loss": furthest([packed.validation_loss], [reference.validation_loss]),
            "first gradient": distance(first, gradients) / size(gradients),
            "weights": distance(finished.adapter.tensors, adapter.tensors) / way,
        }
        assert max(errors.values()) < PROMISED, (trial.trial_id, errors)
        del errors["weights"]
        assert max(errors.values()) < SAME_NUMBERS, (trial.trial_id, errors)


def assert_equal_formats_and_logits(both: Both) -> None:
    ids = torch.arange(4, 20)[None]
    plain = logits_with(both.base, None, ids)
    for trial in TRIALS:
        _, expected, _ = both.reference[trial.trial_id]
        found = both.packed.finished(trial.trial_id).adapter
        assert found is not None
        assert found.config == expected.config
        assert list(found.tensors) == list(expected.tensors)
        for name, tensor in expected.tensors.items():
            assert found.tensors[name].shape == tensor.shape
            assert found.tensors[name].dtype == tensor.dtype
        ours, theirs = (logits_with(both.base, files, ids) for files in (found, expected))
        change = (theirs - plain).abs().max()
        assert change > 1e-3, "the adapter does nothing"
        assert (ours - theirs).abs().max() / change < PROMISED, trial.trial_id


def logits_with(base: Base, files: AdapterFiles | None, ids: Tensor) -> Tensor:
    model: Any = base.model
    with torch.no_grad():
        if files is None:
            return model(input_ids=ids).logits
        loaded = attach_files(base.model, files)
        logits = loaded.model(input_ids=ids).logits
        loaded.detach()
        return logits


def started(base: Base, trial: Trial) -> AdapterFiles:
    method: Any = load_method(trial.method.name)
    targets = target_modules(base.model, trial.targets)
    return method.export_layers(base.model, trial, method.start(base.model, trial, targets=targets))


def by_peft_names(layers: Mapping[str, LayerTensors]) -> dict[str, Tensor]:
    named = dict[str, Tensor]()
    for name, layer in layers.items():
        at = f"base_model.model.{name}"
        named[f"{at}.lora_A.weight"] = layer.a_RD
        named[f"{at}.lora_B.weight"] = layer.b_ER
        if layer.magnitude_E is not None:
            named[f"{at}.lora_magnitude_vector.weight"] = layer.magnitude_E
    return named


def furthest(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest relative difference, number by number."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def distance(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return size({name: some[name] - others[name] for name in some})


def size(tensors: Mapping[str, Tensor]) -> float:
    return float(
        torch.stack([one.double().square().sum() for one in tensors.values()]).sum().sqrt()
    )


# Neighbours do not touch --------------------------------------------------------------------------


def one_of_each(**changes: Any) -> list[Trial]:
    """A short trial of every packable method, and a second of DoRA: batch sizes 3 to 16."""
    sizes = {"lora": 4, "rslora": 16, "loraplus": 5, "dora": 6, "pissa": 9, "milora": 3, "olora": 8}
    trials = [
        replace(
            tiny_trial(
                (SMALL, LARGE)[index % 2],
                method=name,
                batch_size=size,
                rank=1 + index % 4,
                seed=index % 3,
                epochs=2.0 if name in ("pissa", "olora") else 1.0,
                weight_decay=0.1 * (index % 2),
                **changes,
            ),
            trial_id=name,
            learning_rate=2e-4 if name == "loraplus" else 1e-3,
        )
        for index, (name, size) in enumerate(sizes.items())
    ]
    dora = trials[3]
    return [*trials, replace(dora, trial_id="dora2", seed=dora.seed + 1)]


class NanStart:
    """A method whose adapter starts with one number that is none."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, model: Any, trial: Trial, *, targets: Sequence[str]) -> Any:
        layers = self._inner.start(model, trial, targets=targets)
        layers[targets[0]].a_RD[0, 0] = float("nan")
        return layers


@pytest.mark.parametrize("broken", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("by", ["start", "learning rate"])
def test_nan_in_one_adapter_leaves_neighbours_untouched(broken, by):
    trials = one_of_each()
    methods = {}
    if by == "start":
        methods[broken] = NanStart(load_method(broken))
    else:
        trials = [
            replace(one, learning_rate=1e25) if one.trial_id == broken else one for one in trials
        ]
    # The broken one is there from the first step, and its slot is given to another after it.
    trials.sort(key=lambda one: one.trial_id != broken)
    packed = pack(
        trials,
        [SMALL, LARGE],
        shape=shape_for(trials, num_slots=5, tokens_per_step=128),
        find_method=lambda name: methods.get(name) or load_method(name),
    )
    outcome = packed.finished(broken).outcome
    assert outcome.status == "diverged"
    assert outcome.reason is not None
    assert "nan" in outcome.reason or "inf" in outcome.reason
    assert outcome.num_updates < trials[0].num_updates
    for trial in trials[1:]:
        if trial.method.name == broken and by == "start":
            continue
        assert_same_numbers(packed, alone()[trial.trial_id], trial)


@cache
def alone() -> dict[str, Packed]:
    """Each trial of `one_of_each` in a pack of its own."""
    return {
        trial.trial_id: pack([trial], [SMALL, LARGE], shape=shape_for([trial], num_slots=1))
        for trial in one_of_each()
    }


def assert_same_numbers(some: Packed, others: Packed, trial: Trial) -> None:
    """Rounding apart; see the head of this file."""
    one, other = some.finished(trial.trial_id), others.finished(trial.trial_id)
    assert one.outcome.status == other.outcome.status == "done"
    assert furthest(one.outcome.losses, other.outcome.losses) < SAME_NUMBERS
    assert furthest(one.outcome.grad_norms, other.outcome.grad_norms) < SAME_NUMBERS
    assert one.outcome.validation_loss == pytest.approx(
        other.outcome.validation_loss, rel=SAME_NUMBERS
    )
    assert one.outcome.num_tokens == other.outcome.num_tokens
    assert one.adapter is not None
    assert other.adapter is not None
    way = distance(started(tiny_base(), trial).tensors, other.adapter.tensors)
    assert distance(one.adapter.tensors, other.adapter.tensors) < PROMISED * way


PACKINGS = {
    "reversed": (lambda trials: trials[::-1], {}),
    "rotated, two slots": (lambda trials: trials[3:] + trials[:3], {"num_slots": 2}),
    "all at once, a higher rank": (list, {"num_slots": 11, "tokens_per_step": 999, "rank": 6}),
    "two rows at a time": (list, {"num_slots": 3, "tokens_per_step": 32}),
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_never_changes_what_a_trial_sees_nor_its_numbers(monkeypatch, packing, dropout):
    trials = one_of_each(dropout=dropout)
    plain, expected = plainly_packed(dropout)
    order, changes = PACKINGS[packing]
    steps = spied(monkeypatch)
    packed = pack(order(trials), [SMALL, LARGE], shape=shape_for(trials, **changes))
    for trial in trials:
        # The rows of its seed's stream, each once, with dropout keys that are its own.
        rows = DATA[trial.data_fingerprint].train
        stream = row_order(
            trial.seed, num_rows=trial.num_train_rows, start=0, count=trial.num_samples
        )
        seen = steps.of(trial.trial_id)
        assert [ids for ids, _ in seen] == [rows.row(int(at))[0].tobytes() for at in stream]
        assert seen == expected.of(trial.trial_id)
        start, other = steps.starts[trial.trial_id], expected.starts[trial.trial_id]
        assert by_peft_names(start).keys() == by_peft_names(other).keys()
        for name, tensor in by_peft_names(start).items():
            assert torch.equal(tensor, by_peft_names(other)[name]), name
        assert_same_numbers(packed, plain, trial)


@cache
def plainly_packed(dropout: float) -> tuple[Packed, Steps]:
    trials = one_of_each(dropout=dropout)
    with pytest.MonkeyPatch.context() as patch:
        steps = spied(patch)
        return pack(trials, [SMALL, LARGE], shape=shape_for(trials)), steps


def test_the_start_is_the_methods_own():
    _, steps = plainly_packed(0.0)
    for trial in one_of_each():
        expected = started(tiny_base(), trial).tensors
        method: Any = load_method(trial.method.name)
        layers = steps.starts[trial.trial_id]
        found = method.export_layers(tiny_base().model, trial, layers).tensors
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# Same seed, same bits; stop and resume ------------------------------------------------------------


def test_the_same_pack_gives_the_same_bits():
    trials = one_of_each(dropout=0.2)
    torch.manual_seed(99)  # the machine-wide random state must not matter
    again = pack(trials, [SMALL, LARGE], shape=shape_for(trials))
    for trial in trials:
        assert_same_bits(again, plainly_packed(0.2)[0], trial)


def assert_same_bits(some: Packed, others: Packed, trial: Trial) -> None:
    one, other = some.finished(trial.trial_id), others.finished(trial.trial_id)
    assert one.outcome.losses == other.outcome.losses
    assert one.outcome.grad_norms == other.outcome.grad_norms
    assert one.outcome.validation_loss == other.outcome.validation_loss
    assert one.outcome.num_tokens == other.outcome.num_tokens
    assert one.adapter is not None
    assert other.adapter is not None
    assert one.adapter.tensors.keys() == other.adapter.tensors.keys()
    for name, tensor in other.adapter.tensors.items():
        assert torch.equal(one.adapter.tensors[name], tensor), name


STOPS = (0, 3, 8, 14)


def resumed_shape(trials: Sequence[Trial]) -> PackShape:
    """Every trial has a slot, and most batches take several steps."""
    return shape_for(trials, num_slots=8, tokens_per_step=112)


@dataclass(frozen=True)
class Stopped:
    """A pack that was not stopped, and what it had left to do at each of STOPS."""

    packed: Packed
    # Per stop: the snapshots, and the trials that had not come to an end, in the plan's order.
    moments: list[tuple[list[Snapshot], list[Trial]]]


@cache
def stopped(dropout: float) -> Stopped:
    trials = one_of_each(dropout=dropout)
    steps = count()
    packed = pack(
        trials,
        [SMALL, LARGE],
        shape=resumed_shape(trials),
        wants=lambda: next(steps) in STOPS,
    )
    moments = list[tuple[list[Snapshot], list[Trial]]]()
    ended = set[str]()
    previous: Any = None
    for event in packed.events:
        if isinstance(event, Snapshot):
            if not isinstance(previous, Snapshot):
                moments.append(([], [one for one in trials if one.trial_id not in ended]))
            moments[-1][0].append(event)
        if isinstance(event, Finished):
            ended.add(event.outcome.trial_id)
        previous = event
    assert len(moments) == len(STOPS)
    return Stopped(packed, moments)


def through_files(folder: Path, snapshots: Sequence[Snapshot]) -> dict[str, Snapshot | None]:
    for one in snapshots:
        save_snapshot(folder / f"{one.trial_id}.safetensors", one)
    return {
        one.trial_id: load_snapshot(folder / f"{one.trial_id}.safetensors") for one in snapshots
    }


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stop", range(len(STOPS)))
def test_going_on_from_snapshots_is_bit_equal_to_not_stopping(tmp_path, stop, dropout):
    whole = stopped(dropout)
    snapshots, left = whole.moments[stop]
    torch.manual_seed(1234)  # the machine-wide random state must not matter
    packed = pack(
        left,
        [SMALL, LARGE],
        shape=resumed_shape(one_of_each(dropout=dropout)),
        snapshots=through_files(tmp_path, snapshots),
    )
    for trial in left:
        assert_same_bits(packed, whole.packed, trial)


def test_the_stops_catch_every_method_and_batches_that_are_partly_done():
    trials = {one.trial_id: one for one in one_of_each()}
    for dropout in (0.0, 0.2):
        snapshots = [one for found, _ in stopped(dropout).moments for one in found]
        assert {trials[one.trial_id].method.name for one in snapshots} == set(PACKABLE)
        partly = {one.trial_id for one in snapshots if one.facts["rows_done"]}
        assert len(partly) >= 3
        assert any(one.update > 0 and one.facts["rows_done"] for one in snapshots)


def test_going_on_is_bit_equal_where_many_dora_trials_update_in_one_step(tmp_path):
    trials = [
        replace(tiny_trial(LARGE, method="dora", seed=seed, rank=3), trial_id=f"dora{seed}")
        for seed in range(5)
    ]
    shape = shape_for(trials, num_slots=5, tokens_per_step=1000)
    steps = count()
    whole = pack(trials, [LARGE], shape=shape, wants=lambda: next(steps) == 2)
    assert {one.update for one in whole.snapshots()} == {3}
    packed = pack(
        trials, [LARGE], shape=shape, snapshots=through_files(tmp_path, whole.snapshots())
    )
    for trial in trials:
        assert_same_bits(packed, whole, trial)


@pytest.mark.parametrize("stop", [1, 2])
def test_going_on_in_another_pack_gives_the_same_numbers(tmp_path, stop):
    whole = stopped(0.2)
    snapshots, left = whole.moments[stop]
    extra = replace(tiny_trial(LARGE, rank=7), trial_id="extra")
    shape = shape_for([extra, *one_of_each(dropout=0.2)], num_slots=2, tokens_per_step=50)
    packed = pack(
        [extra, *left[::-1]],
        [SMALL, LARGE],
        shape=shape,
        snapshots=through_files(tmp_path, snapshots),
    )
    for trial in left:
        assert_same_numbers(packed, whole.packed, trial)

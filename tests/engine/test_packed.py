"""The packed engine against the reference engine, against itself among others, and interrupted.

Tolerances. Both engines compute in float32 and sum in other orders, so that one number differs by a
few units of 6e-8. Learning rates here are such that training is not chaotic: what is off in the
last loss is no more than in the first. Measured over 20 to 25 updates, relative: losses up to 2e-7,
gradient norms 5e-7, validation losses 1e-7, first gradients 8e-7; weights, relative to the way that
they have moved, mostly 2e-6, and 3e-5 in one trial (where a gradient is nearly zero, the direction
of its Adam step is rounding). What is promised is 1e-4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.methods import attach_files, load_method
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.base import LayerTensors
from loratune.models.load import Base
from loratune.models.targets import target_modules
from loratune.records import Outcome, Trial
from tiny_packs import PACKABLE, Packed, Steps, mixed_trials, pack, spied
from tiny_trials import random_data, tiny_base, train

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


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3"])
def both(request) -> Both:
    base = tiny_base(request.param)
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


def test_the_pack_covers_what_may_differ_between_trials(both):
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


def test_packed_equals_reference(both):
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


def test_the_adapter_has_the_format_of_the_references_and_gives_its_logits(both):
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

"""The reference engine against Trainer, against closed forms, and against itself interrupted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from feeds import ListFeed
from loratune.data.order import row_order
from loratune.data.rows import pad_rows
from loratune.engine import loss_scale
from loratune.engine.base import Finished, Progress, Snapshot
from loratune.engine.loss import mean_token_loss
from loratune.engine.reference import ReferenceEngine
from loratune.engine.snapshot import load_snapshot, save_snapshot
from loratune.methods import load_method
from loratune.methods.base import Attached, ParameterGroup
from loratune.models.load import Base
from loratune.records import NoiseProbe, NoiseSchedule, Trial
from row_oracle import differences
from tiny_models import PAD_ID
from tiny_trials import random_data, tiny_base, tiny_trial, train

METHODS = ["lora", "rslora", "pissa", "milora", "dora", "loraplus", "olora", "adalora"]


# Against transformers' Trainer and PEFT -----------------------------------------------------------


# transformers' own deprecation, met inside PEFT's get_peft_model.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_equal_those_of_trainer_and_peft(tmp_path, accumulation):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = random_data(160, num_validation=0)
    trial = tiny_trial(data, batch_size=8, weight_decay=0.01, max_grad_norm=0.5, warmup_steps=3)
    assert trial.num_updates == 20
    ours, adapter = train(trial, data)
    assert adapter is not None

    # PEFT's own model, with our initial weights: those of the adapter that our method attaches.
    base = tiny_base()
    attached = load_method("lora").attach(base.model, trial, targets=_all_linear(base.model))
    initial = attached.export().tensors
    attached.detach()
    model = get_peft_model(
        tiny_base().model,
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0),
    )
    _load_peft_weights(model, initial)

    order = row_order(trial.seed, num_rows=160, start=0, count=160)
    rows = [_as_example(data.train, int(index)) for index in order]

    class Losses(TrainerCallback):
        values: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                self.values.append(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any):
            return torch.utils.data.SequentialSampler(rows)

        def log(self, logs: Any, *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)

    Losses.values = []
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            learning_rate=trial.learning_rate,
            weight_decay=0.01,
            max_grad_norm=0.5,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=cast("Any", rows),
        data_collator=_collate,
        callbacks=[Losses()],
    )
    trainer.train()
    theirs = Losses.values
    assert len(theirs) == 20
    # float32 rounding, another order of sums; Trainer rounds its log to 4 to 6 digits.
    assert max(abs(a - b) for a, b in zip(ours.losses, theirs, strict=True)) < 1e-5


def _all_linear(model: torch.nn.Module) -> list[str]:
    from loratune.models.targets import target_modules

    return list(target_modules(model, ["all-linear"]))


def _load_peft_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, dict(tensors))
    assert not result.unexpected_keys


def _as_example(rows: Any, index: int) -> dict[str, list[int]]:
    ids, is_target = rows.row(index)
    labels = np.where(is_target, ids, -100)
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def _collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(one["input_ids"]) for one in examples)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(one["input_ids"], PAD_ID) for one in examples]),
        "labels": torch.tensor([padded(one["labels"], -100) for one in examples]),
        "attention_mask": torch.tensor(
            [padded([1] * len(one["input_ids"]), 0) for one in examples]
        ),
    }


# The effective batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_how_a_batch_is_cut_changes_nothing_but_rounding(method):
    data = random_data(40)
    trial = tiny_trial(data, method=method, batch_size=16)
    whole, _ = train(trial, data, tokens_per_microbatch=10_000)
    for budget in (1, 30, 60):
        cut, _ = train(trial, data, tokens_per_microbatch=budget)
        assert cut.losses == pytest.approx(whole.losses, rel=2e-5)
        assert cut.validation_loss == pytest.approx(whole.validation_loss, rel=2e-5)


def test_the_effective_batch_counted_from_the_gradients_is_the_label():
    """Plain SGD in B alone: the first gradient is the mean over exactly batch_size rows' tokens.

    Each row gets a weight through a probe: the gradient of the batch must be the token-weighted
    mean of the gradients of its rows taken one at a time, and of no other row.
    """
    data = random_data(23)
    base = tiny_base()
    for batch_size, update in ((7, 0), (7, 3), (23, 0)):
        trial = tiny_trial(data, batch_size=batch_size)
        count = trial.last_batch_size if update == trial.num_updates - 1 else batch_size
        indices = row_order(0, num_rows=23, start=update * batch_size, count=count)
        expected = _gradient_one_row_at_a_time(base, trial, data, indices)
        recorded = _Recorder(load_method("lora"), update)
        train(
            replace(trial, learning_rate=1e-30),
            data,
            base=base,
            tokens_per_microbatch=25,
            find_method=lambda _, recorded=recorded: recorded,
        )
        assert len(indices) == count
        assert recorded.gradient is not None
        assert torch.allclose(recorded.gradient, expected, rtol=1e-4, atol=1e-7)


def test_an_odd_last_batch_is_one_update_of_its_true_size():
    data = random_data(23)
    trial = tiny_trial(data, batch_size=7)
    assert (trial.num_updates, trial.last_batch_size) == (4, 2)
    outcome, _ = train(trial, data)
    assert outcome.num_updates == 4
    assert outcome.num_tokens == data.facts.num_tokens


@dataclass
class _Recorder:
    """A method that notes the gradient of B at one update."""

    inner: Any
    at: int
    gradient: Tensor | None = None

    def attach(self, model: Any, trial: Trial, *, targets: Sequence[str]) -> Any:
        attached = self.inner.attach(model, trial, targets=targets)
        note = attached.after_backward

        def after_backward(update: int) -> None:
            if update == self.at:
                self.gradient = _flat_gradient(attached)
            note(update)

        attached.after_backward = after_backward
        return attached


def _flat_gradient(attached: Attached) -> Tensor:
    parts = [
        parameter.grad.detach().flatten().clone()
        for group in attached.parameter_groups()
        for parameter in group.parameters
        if parameter.grad is not None
    ]
    return torch.cat(parts)


def _gradient_one_row_at_a_time(base: Any, trial: Trial, data: Any, indices: Any) -> Tensor:
    attached = load_method("lora").attach(base.model, trial, targets=_all_linear(base.model))
    total, tokens = 0.0, 0
    for index in indices:
        padded = pad_rows(data.train, [index], pad_id=PAD_ID)
        ids = torch.from_numpy(padded.input_ids)
        logits = attached.model(input_ids=ids).logits[0, :-1]
        mask = torch.from_numpy(padded.is_target)[0, 1:]
        log_probabilities = logits.log_softmax(-1)[mask]
        picked = log_probabilities.gather(1, ids[0, 1:][mask].unsqueeze(1))
        total = total - picked.sum()
        tokens += int(mask.sum())
    (total / tokens).backward()  # type: ignore[union-attr]
    gradient = _flat_gradient(attached)
    attached.detach()
    return gradient


# The exact invariance -----------------------------------------------------------------------------


@dataclass
class _Rescaled:
    """A method whose A is multiplied by p and B by q, with Adam's numbers rescaled to match."""

    inner: Any
    p: float
    q: float

    def attach(self, model: Any, trial: Trial, *, targets: Sequence[str]) -> Any:
        scale = trial.scale / (self.p * self.q)
        alpha = trial.alpha / (self.p * self.q)
        attached = self.inner.attach(
            model, replace(trial, scale=scale, alpha=alpha), targets=targets
        )
        factors = {"A": self.p, "B": self.q}
        groups = attached.parameter_groups()
        with torch.no_grad():
            for group in groups:
                for parameter in group.parameters:
                    parameter.mul_(factors[group.name])
        attached.parameter_groups = lambda: [
            ParameterGroup(
                name=group.name,
                parameters=group.parameters,
                lr_factor=group.lr_factor * factors[group.name],
                eps_factor=group.eps_factor / factors[group.name],
                weight_decay_factor=group.weight_decay_factor / factors[group.name],
            )
            for group in groups
        ]
        return attached


@pytest.mark.parametrize("method", ["lora", "rslora", "loraplus"])
@pytest.mark.parametrize(("p", "q"), [(2.0, 8.0), (0.25, 4.0), (16.0, 0.125)])
def test_rescaling_a_and_b_with_adams_numbers_changes_no_bit(method, p, q):
    data = random_data(40)
    trial = tiny_trial(data, method=method, weight_decay=0.1, eps=1e-6)
    plain, _ = train(trial, data)
    rescaled, _ = train(trial, data, find_method=lambda name: _Rescaled(load_method(name), p, q))
    assert rescaled.losses == plain.losses
    assert rescaled.validation_loss == plain.validation_loss


def test_rescaling_without_adams_numbers_does_change_the_training():
    data = random_data(40)
    trial = tiny_trial(data)
    plain, _ = train(trial, data)

    @dataclass
    class OnlyAlpha(_Rescaled):
        def attach(self, model: Any, trial: Trial, *, targets: Sequence[str]) -> Any:
            attached = super().attach(model, trial, targets=targets)
            groups = attached.parameter_groups()
            attached.parameter_groups = lambda: [
                ParameterGroup(name=group.name, parameters=group.parameters) for group in groups
            ]
            return attached

    other, _ = train(trial, data, find_method=lambda name: OnlyAlpha(load_method(name), 2.0, 8.0))
    assert other.losses[0] == plain.losses[0]
    assert other.losses[3] != plain.losses[3]


# Stop and resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_any_snapshot_is_bit_equal(tmp_path, method):
    data = random_data(40)
    trial = tiny_trial(data, method=method, batch_size=4, dropout=0.1, max_grad_norm=1.0)
    base = tiny_base()
    engine = ReferenceEngine(
        base, {trial.data_fingerprint: data}, tokens_per_microbatch=lambda _: 40
    )
    events = list(engine.train(ListFeed([trial], wants=lambda: True)))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.adapter is not None
    snapshots = [event for event in events if isinstance(event, Snapshot)]
    assert len(snapshots) == trial.num_updates - 1
    for snapshot in (snapshots[0], snapshots[4], snapshots[-1]):
        path = tmp_path / "snapshot.safetensors"
        save_snapshot(path, snapshot)
        # The machine-wide random state must not matter.
        torch.manual_seed(1234)
        again, adapter = train(trial, data, snapshot=load_snapshot(path), tokens_per_microbatch=99)
        assert again.losses == finished.outcome.losses
        assert again.grad_norms == finished.outcome.grad_norms
        assert again.validation_loss == finished.outcome.validation_loss
        assert adapter is not None
        for name, tensor in finished.adapter.tensors.items():
            assert torch.equal(adapter.tensors[name], tensor), name


def test_a_snapshot_file_that_is_torn_counts_as_none(tmp_path):
    path = tmp_path / "snapshot.safetensors"
    save_snapshot(
        path,
        Snapshot(
            "trial-test", 3, {"adapter.a": torch.ones(3)}, {"losses": [0.1 + 0.2]}, "reference"
        ),
    )
    whole = load_snapshot(path)
    assert whole is not None
    assert whole.facts["losses"] == [0.1 + 0.2]
    path.write_bytes(path.read_bytes()[:-5])
    assert load_snapshot(path) is None
    path.write_bytes(b"")
    assert load_snapshot(path) is None


def test_trials_of_one_feed_train_one_after_another_as_each_does_alone():
    data = random_data(40)
    trials = [
        replace(tiny_trial(data, method=method, dropout=0.1), trial_id=f"trial-{method}")
        for method in ("pissa", "lora", "dora", "adalora")
    ]
    alone = {trial.trial_id: train(trial, data)[0] for trial in trials}
    feed = ListFeed(
        trials, taken=frozenset(["trial-lora"]), drops=lambda trial_id: trial_id == "trial-dora"
    )
    engine = ReferenceEngine(
        tiny_base(), {data.facts.fingerprint: data}, tokens_per_microbatch=lambda _: 10_000
    )
    events = list(engine.train(feed))
    finished = [event.outcome for event in events if isinstance(event, Finished)]
    assert feed.claimed == ["trial-pissa", "trial-dora", "trial-adalora"]
    assert [outcome.trial_id for outcome in finished] == ["trial-pissa", "trial-adalora"]
    # The dropped one is forgotten after its first update.
    assert sum(isinstance(one, Progress) and one.trial_id == "trial-dora" for one in events) == 1
    for outcome in finished:
        assert outcome.losses == alone[outcome.trial_id].losses
        assert outcome.validation_loss == alone[outcome.trial_id].validation_loss


def test_closing_an_unfinished_trial_leaves_the_base_as_it_was():
    data = random_data(40)
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    trial = tiny_trial(data, method="pissa")
    engine = ReferenceEngine(
        base, {trial.data_fingerprint: data}, tokens_per_microbatch=lambda _: 99
    )
    events = engine.train(ListFeed([trial]))
    next(events)
    events.close()
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# float16 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("first_scale", [1.0, 2.0**16, 2.0**40])
def test_float16_gives_float32s_numbers_whatever_loss_scale_it_begins_with(
    monkeypatch, first_scale, method
):
    data = random_data(40)
    trial = tiny_trial(data, method=method, learning_rate=1e-3)
    exact, _ = train(trial, data)
    monkeypatch.setattr(loss_scale, "FIRST_LOSS_SCALE", first_scale)
    half, _ = train(trial, data, base=tiny_base(dtype=torch.float16), tokens_per_microbatch=30)
    assert half.status == "done", half.reason
    # float16 has 11 bits: 5e-4 a rounding.
    assert half.losses == pytest.approx(exact.losses, rel=5e-3)
    assert half.grad_norms == pytest.approx(exact.grad_norms, rel=5e-2)


def test_gradients_too_small_for_float16_come_through_at_a_larger_scale(monkeypatch):
    data = random_data(40)
    trial = tiny_trial(data, batch_size=40, steps=1)
    exact, _ = train(trial, data)

    def norm_from(scale: float) -> float:
        monkeypatch.setattr(loss_scale, "FIRST_LOSS_SCALE", scale)
        outcome, _ = train(trial, data, base=tiny_base(dtype=torch.float16))
        return outcome.grad_norms[0]

    # As if the batch had 4096 times as many tokens, each with so much less weight.
    assert norm_from(2.0**-12) != pytest.approx(exact.grad_norms[0], rel=5e-2)
    assert norm_from(2.0**16) == pytest.approx(exact.grad_norms[0], rel=5e-3)


def test_in_float16_going_on_is_bit_equal_and_keeps_the_loss_scale(monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST_LOSS_SCALE", 2.0**40)
    data, base = random_data(40), tiny_base(dtype=torch.float16)
    trial = tiny_trial(data, learning_rate=1e-3)
    engine = ReferenceEngine(
        base, {data.facts.fingerprint: data}, tokens_per_microbatch=lambda _: 99
    )
    events = list(engine.train(ListFeed([trial], wants=lambda: True)))
    whole = next(one.outcome for one in events if isinstance(one, Finished))
    middle = [one for one in events if isinstance(one, Snapshot)][1]
    scale = middle.facts["loss_scale"]
    assert isinstance(scale, float)
    assert 1 < scale < 2.0**40
    rest, _ = train(trial, data, base=base, snapshot=middle)
    assert rest.losses == whole.losses
    assert rest.grad_norms == whole.grad_norms


def test_in_float16_probes_are_those_of_float32():
    data = random_data(40)
    trial = tiny_trial(data, learning_rate=1e-3)
    schedule = NoiseSchedule(1, 8, held_out_rows=4)

    def probes(dtype: torch.dtype) -> list[NoiseProbe]:
        engine = ReferenceEngine(
            tiny_base(dtype=dtype),
            {data.facts.fingerprint: data},
            tokens_per_microbatch=lambda _: 99,
            noise=schedule,
        )
        return [one for one in engine.train(ListFeed([trial])) if isinstance(one, NoiseProbe)]

    half, exact = probes(torch.float16), probes(torch.float32)
    assert len(half) == len(exact) > 0
    assert max(differences(half[0], exact[0]).values()) < 2e-2


# Out of memory ------------------------------------------------------------------------------------


@dataclass
class _TooLarge:
    """A method on a device whose memory is too small `times` times."""

    inner: Any
    times: int
    error: Exception = field(
        default_factory=lambda: torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB"
        )
    )

    def attach(self, model: Any, trial: Trial, *, targets: Sequence[str]) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return self.inner.attach(model, trial, targets=targets)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_trial_that_does_not_fit_is_cut_smaller_and_goes_on(error):
    data = random_data(40)
    trial = tiny_trial(data, batch_size=20)
    whole, _ = train(trial, data)
    small = _TooLarge(load_method("lora"), times=2, error=error)
    cut, _ = train(trial, data, tokens_per_microbatch=200, find_method=lambda _: small)
    assert cut.status == "done"
    assert cut.losses == pytest.approx(whole.losses, rel=2e-5)
    assert cut.rows_per_microbatch == 200 // 4 // data.facts.max_row_tokens


def test_a_trial_of_which_no_row_fits_is_an_outcome():
    data = random_data(40)
    never = _TooLarge(load_method("lora"), times=10**9)
    outcome, adapter = train(tiny_trial(data), data, find_method=lambda _: never)
    assert outcome.status == "out_of_memory"
    assert adapter is None
    assert outcome.reason is not None
    assert "Tried to allocate 2.00 GiB" in outcome.reason


# What the seed moves ------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order():
    data = random_data(40)
    for method, draws in (("lora", True), ("pissa", False)):
        trial = tiny_trial(data, method=method)
        first, _ = train(trial, data)
        second, _ = train(trial, data)
        other, _ = train(replace(trial, seed=1), data)
        assert first.losses == second.losses
        assert first.losses != other.losses
        # Every method starts as the base: the first loss depends on the rows alone.
        rows = row_order(1, num_rows=40, start=0, count=8)
        expected = mean_token_loss(
            tiny_base().model,
            data.train.take(rows),
            pad_id=PAD_ID,
            device=torch.device("cpu"),
            tokens_per_microbatch=1000,
        )
        assert other.losses[0] == pytest.approx(expected, rel=1e-5)
        assert draws in (True, False)


def test_equal_seeds_see_equal_rows_whatever_the_method_or_learning_rate():
    data = random_data(40)
    firsts = {
        train(tiny_trial(data, method=method, learning_rate=rate), data)[0].losses[0]
        for method in ("lora", "rslora", "loraplus", "dora")
        for rate in (1e-4, 1e-2)
    }
    assert max(firsts) - min(firsts) < 1e-5


# Divergence ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_an_outcome_with_its_update():
    data = random_data(40)
    trial = tiny_trial(data, learning_rate=1e25, steps=30)
    outcome, adapter = train(trial, data)
    assert outcome.status == "diverged"
    assert adapter is None
    assert outcome.stopped_at_update == outcome.num_updates - 1 < 29
    assert outcome.reason is not None
    assert "nan" in outcome.reason or "inf" in outcome.reason
    assert not math.isfinite(outcome.losses[-1]) or not math.isfinite(outcome.grad_norms[-1])


def test_a_divergent_trial_leaves_the_base_usable():
    data = random_data(40)
    base = tiny_base()
    alone, _ = train(tiny_trial(data), data)
    train(tiny_trial(data, learning_rate=1e25, steps=30), data, base=base)
    after, _ = train(tiny_trial(data), data, base=base)
    assert after.losses == alone.losses


def test_train_loss_is_the_token_mean_over_the_last_tenth():
    data = random_data(40)
    trial = tiny_trial(data, batch_size=4, epochs=2.0)
    assert trial.num_updates == 20
    outcome, _ = train(trial, data)
    tokens = []
    for update in (18, 19):
        rows = row_order(0, num_rows=40, start=update * 4, count=4)
        tokens.append(int(data.train.take(rows).is_target.sum()))
    expected = (outcome.losses[18] * tokens[0] + outcome.losses[19] * tokens[1]) / sum(tokens)
    assert outcome.train_loss == pytest.approx(expected, rel=1e-12)


def _move(base: Base, target: Any) -> None:
    to: Any = base.model.to  # transformers wraps nn.Module.to untyped
    to(target)


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_weights_gradients_and_adams_state_are_float32_over_a_bfloat16_base(method):
    data = random_data(40)
    base = tiny_base()
    _move(base, torch.bfloat16)
    trial = tiny_trial(data, method=method, precision="bfloat16", steps=10)
    engine = ReferenceEngine(
        base, {trial.data_fingerprint: data}, tokens_per_microbatch=lambda _: 99
    )
    events = list(engine.train(ListFeed([trial], wants=lambda: True)))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.outcome.status == "done"
    snapshot = next(event for event in events if isinstance(event, Snapshot))
    moments = [t for name, t in snapshot.tensors.items() if name.startswith("optimizer.")]
    assert moments
    assert {tensor.dtype for tensor in moments} == {torch.float32}
    assert finished.adapter is not None
    assert {tensor.dtype for tensor in finished.adapter.tensors.values()} <= {torch.float32}
    assert all(p.dtype == torch.bfloat16 for p in base.model.parameters())

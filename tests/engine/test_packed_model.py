"""The packed model against plain PEFT on the base, one row at a time; and what it refuses."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from loratune.data.rows import EncodedRows
from loratune.engine.dora_gains import DoraGains
from loratune.engine.laying import StepRows, lay_out_step
from loratune.engine.packed_linear import Dropout, StepRouting
from loratune.engine.packed_model import PackedModel, group_targets, installed
from loratune.engine.slots import Slots, from_row, frozen_row, lay_out, to_row
from loratune.errors import ModelError
from loratune.methods import load_method
from loratune.methods.base import LayerTensors
from loratune.models.targets import block_linears, target_modules
from loratune.records import Trial
from tiny_models import VOCAB_SIZE, tiny_model
from tiny_packs import PACKABLE, pack, shape_for
from tiny_trials import random_data, random_rows, tiny_base, tiny_trial

CPU = torch.device("cpu")
DATA = random_data(24)
# float32 with other orders of sums: measured up to 6e-6 of the largest number (where a large part
# is taken out of the base), mostly 1e-6.
ROUNDING = 2e-5


def trials_of_all_methods(*, dropout: float) -> list[Trial]:
    return [
        replace(
            tiny_trial(DATA, method=name, rank=1 + index % 4, seed=index, dropout=dropout),
            trial_id=name,
        )
        for index, name in enumerate(PACKABLE)
    ]


def trained_a_little(layers: Mapping[str, LayerTensors], *, seed: int) -> dict[str, LayerTensors]:
    """Layers as after some updates: every trained number moved, so that none stays zero."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

    return {
        name: replace(
            one,
            a_RD=moved(one.a_RD),
            b_ER=moved(one.b_ER),
            magnitude_E=None if one.magnitude_E is None else moved(one.magnitude_E),
        )
        for name, one in layers.items()
    }


class Filled:
    """A pack with one trial of every method in it, a slot empty, and one row or two for each."""

    def __init__(self, family: str, *, dropout: float) -> None:
        self.model = tiny_model(family).requires_grad_(False)
        self.trials = trials_of_all_methods(dropout=dropout)
        self.targets = target_modules(self.model, ["all-linear"])
        groups = group_targets(self.model, self.targets, apart=dropout > 0)
        layout = lay_out(groups, rank=4, magnitudes=True)
        self.slots = Slots(layout, num_slots=8, dtype=torch.float32, device=CPU, corrected=True)
        self.keep_A = torch.full((8,), 1 - dropout) if dropout else None
        self.layers = dict[str, dict[str, LayerTensors]]()
        self.slot_of = {
            trial.trial_id: slot
            for trial, slot in zip(self.trials, [0, 1, 2, 4, 5, 6, 7], strict=True)
        }

    def __enter__(self) -> "Filled":
        linears = block_linears(self.model)
        weights = {name: linears[name].weight.clone() for name in self.targets}
        for index, trial in enumerate(self.trials):
            method: Any = load_method(trial.method.name)
            start = method.start(self.model, trial, targets=self.targets)
            self.layers[trial.trial_id] = trained_a_little(start, seed=index)
        self._context = installed(
            self.model, self.slots, keep_A=self.keep_A, longest_row=12, compile_blocks=False
        )
        self.packed: PackedModel = self._context.__enter__()
        gains = DoraGains(self.slots, weights)
        for trial in self.trials:
            slot, layers = self.slot_of[trial.trial_id], self.layers[trial.trial_id]
            layout = self.slots.layout
            frozen = frozen_row(layers, layout)
            self.slots.put(slot, to_row(layers, layout), frozen_P=frozen, scale=trial.scale)
            self.slots.refresh(slot)
            if trial.method.name == "dora":
                gains.refresh([slot])
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def step(self) -> StepRows:
        """Two rows of each trial, the second of them long."""
        rows = random_rows(2 * len(self.trials), seed=3)
        slots = np.repeat(sorted(self.slot_of.values()), 2)
        return StepRows(
            rows=rows,
            slots=slots,
            weights=np.linspace(0.5, 1.5, len(rows)),
            keys=np.arange(len(rows)) * 7919 + 1,
            fresh=frozenset(slots.tolist()),
        )


def rows_of(step: StepRows, slot: int) -> list[tuple[EncodedRows, float, int]]:
    """Row by row: the row alone, its weight and its key."""
    return [
        (step.rows.take([at]), float(step.weights[at]), int(step.keys[at]))
        for at in np.flatnonzero(step.slots == slot)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "olmo2"])
def test_every_slots_logits_are_plain_pefts_on_each_row_alone(family):
    with Filled(family, dropout=0.0) as filled:
        step = filled.step()
        logits_MV = filled.packed.logits(step)
        # Rows lie end to end in the order of the slots.
        begins = np.searchsorted(step.slots, range(8))
    plain = tiny_model(family).requires_grad_(False)
    for trial in filled.trials:
        slot = filled.slot_of[trial.trial_id]
        at = int(step.rows.offsets[begins[slot]])
        for row, _, _ in rows_of(step, slot):
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            with peft_model(plain, trial, filled.layers[trial.trial_id]) as model:
                expected_TV = model(input_ids=ids).logits[0].detach()
            found_TV = logits_MV[at : at + ids.shape[1]]
            error = (found_TV - expected_TV).abs().max() / expected_TV.abs().max()
            assert error < ROUNDING, trial.trial_id
            at += ids.shape[1]


class peft_model:  # used as a function in a with statement
    """PEFT's own layers with these numbers in them; its dropout replaced by `masked`, if given."""

    def __init__(
        self,
        base: PreTrainedModel,
        trial: Trial,
        layers: Mapping[str, LayerTensors],
        masked: Callable[[int], nn.Module] | None = None,
    ) -> None:
        targets = target_modules(base, ["all-linear"])
        self._attached: Any = load_method(trial.method.name).attach(base, trial, targets=targets)
        self.inner: dict[str, Any] = {name: base.get_submodule(name) for name in targets}
        with torch.no_grad():
            for index, (name, layer) in enumerate(self.inner.items()):
                layer.lora_A["default"].weight.copy_(layers[name].a_RD)
                layer.lora_B["default"].weight.copy_(layers[name].b_ER)
                magnitude = layers[name].magnitude_E
                if magnitude is not None:
                    layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
                if masked is not None:
                    layer.lora_dropout["default"] = masked(index)

    def __enter__(self) -> Any:
        self._attached.model.train()
        return self._attached.model

    def __exit__(self, *error: Any) -> None:
        self._attached.model.eval()
        self._attached.detach()

    def gradients(self) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for name, layer in self.inner.items():
            found[f"{name} A"] = layer.lora_A["default"].weight.grad
            found[f"{name} B"] = layer.lora_B["default"].weight.grad
            if "default" in layer.lora_magnitude_vector:
                found[f"{name} m"] = layer.lora_magnitude_vector["default"].weight.grad
        return found


class Masked(nn.Module):
    """A layer's dropout on one row, from a mask that was worked out before."""

    def __init__(self, keys_T: Tensor, *, salt: int, keep: float) -> None:
        super().__init__()
        self._keys_T, self._salt, self._keep = keys_T, salt, keep

    def forward(self, x_BTD: Tensor) -> Tensor:
        step = StepRouting()
        step.token_key_M = self._keys_T
        step.keep_A = torch.tensor([self._keep])
        step.routing = [torch.zeros(len(self._keys_T), dtype=torch.int32)]
        return x_BTD * Dropout(salt=self._salt, device=CPU)(torch.ones_like(x_BTD[0]), step)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_and_gradients_are_pefts_given_the_same_dropout_mask(dropout):
    with Filled("llama", dropout=dropout) as filled:
        step = filled.step()
        losses_A = torch.zeros(8, dtype=torch.float64)
        filled.packed.train_step(step, into_A=losses_A)
        grads_AP = filled.slots.grads_AP
        assert not grads_AP[3].any(), "an empty slot"
        assert losses_A[3] == 0
    plain = tiny_model("llama").requires_grad_(False)
    for trial in filled.trials:
        slot = filled.slot_of[trial.trial_id]
        total, expected = 0.0, dict[str, Tensor]()
        for row, weight, key in rows_of(step, slot):
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            alone = StepRows(row, np.zeros(1, int), np.ones(1), np.array([key]), frozenset())
            laid = lay_out_step(alone, num_slots=1, longest_row=12)
            keys_T = torch.from_numpy(laid.token_keys)

            def masked(index: int, keys_T: Tensor = keys_T) -> nn.Module:
                return Masked(keys_T, salt=index, keep=1 - dropout)

            context = peft_model(
                plain, trial, filled.layers[trial.trial_id], masked if dropout else None
            )
            with context as model:
                loss = -model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                is_target = torch.from_numpy(row.is_target)[1:]
                summed = loss[is_target].gather(1, ids[0, 1:][is_target, None]).sum()
                (weight * summed).backward()
                total += float(summed.detach())
                for name, gradient in context.gradients().items():
                    expected[name] = expected.get(name, 0) + gradient
        assert float(losses_A[slot]) == pytest.approx(total, rel=ROUNDING), trial.trial_id
        layers = from_row(
            grads_AP[slot],
            filled.slots.layout,
            rank=trial.rank,
            frozen_P=None,
            magnitudes=trial.method.name == "dora",
        )
        found = gradients_of(layers)
        assert found.keys() == expected.keys()
        largest = max(float(one.abs().max()) for one in expected.values())
        for name, gradient in expected.items():
            error = float((found[name] - gradient).abs().max()) / largest
            assert error < ROUNDING, (trial.trial_id, name)


def gradients_of(layers: Mapping[str, LayerTensors]) -> dict[str, Tensor]:
    found = dict[str, Tensor]()
    for name, one in layers.items():
        found[f"{name} A"], found[f"{name} B"] = one.a_RD, one.b_ER
        if one.magnitude_E is not None:
            found[f"{name} m"] = one.magnitude_E
    return found


def test_dropout_falls_on_training_and_not_on_validation():
    losses = {}
    for dropout in (0.0, 0.3):
        with Filled("llama", dropout=dropout) as filled:
            step, trained_A = filled.step(), torch.zeros(8, dtype=torch.float64)
            losses[dropout] = float(filled.packed.loss_sum(step)), filled.packed.logits(step)
            filled.packed.train_step(step, into_A=trained_A)
            is_dropped = abs(float(trained_A.sum()) / losses[dropout][0] - 1) > 1e-3
            assert is_dropped == (dropout > 0)
    assert losses[0.3][0] == pytest.approx(losses[0.0][0], rel=1e-6)
    assert torch.allclose(losses[0.3][1], losses[0.0][1], atol=1e-4)


def test_numbers_beyond_a_trials_rank_get_no_gradient():
    with Filled("llama", dropout=0.0) as filled:
        filled.packed.train_step(filled.step(), into_A=torch.zeros(8, dtype=torch.float64))
        layout = filled.slots.layout
        for trial in filled.trials:
            slot = filled.slot_of[trial.trial_id]
            gradient_P = filled.slots.grads_AP[slot]
            own = from_row(gradient_P, layout, rank=trial.rank, frozen_P=None, magnitudes=True)
            if trial.method.name != "dora":
                magnitudes: list[Any] = [one.magnitude_E for one in own.values()]
                assert not any(bool(one.any()) for one in magnitudes)
            # What is not the trial's own is zero: laid out again, its own is all that there is.
            assert torch.equal(to_row(own, layout), gradient_P)


# torch's compiler instantiates an autograd function to trace it, and warns of that itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dropout", [0.1, pytest.param(0.0, marks=pytest.mark.slow)])
def test_compiled_layers_share_their_code_however_many_there_are(monkeypatch, dropout):
    compiled = nn.Module.compile
    # A backend that needs no C compiler; what is traced anew is the same.
    monkeypatch.setattr(
        nn.Module, "compile", lambda block, **more: compiled(block, backend="aot_eager", **more)
    )
    trial = tiny_trial(DATA, dropout=dropout, batch_size=12)
    plain = pack([trial], [DATA], shape=shape_for([trial], num_slots=1))
    graphs = dict[int, int]()
    for num_layers in (2, 3):
        torch.compiler.reset()
        counters["stats"].clear()
        model = tiny_model("llama", num_layers=num_layers).requires_grad_(False)
        packed = pack(
            [trial],
            [DATA],
            base=replace(tiny_base(), model=model),
            shape=shape_for([trial], num_slots=1),
            compile_blocks=True,
        )
        graphs[num_layers] = counters["stats"]["unique_graphs"]
        if num_layers == 2:
            found, expected = (run.finished(trial.trial_id).outcome for run in (packed, plain))
            assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    torch.compiler.reset()
    assert graphs[2] > 0
    assert graphs[3] == graphs[2]


# What is refused ----------------------------------------------------------------------------------


def small(config: type, **more: Any) -> Any:
    return config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.18,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


STRANGERS: dict[str, Callable[[], PreTrainedModel]] = {
    # A soft cap on the logits, and one on the attention scores.
    "Gemma2": lambda: Gemma2ForCausalLM(
        small(Gemma2Config, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    ),
    # Logits that are scaled after the head.
    "Cohere": lambda: CohereForCausalLM(small(CohereConfig, logit_scale=0.95)),
    "Granite": lambda: GraniteForCausalLM(small(GraniteConfig, logits_scaling=1.05)),
    # Attention with a sink for each head.
    "GptOss": lambda: GptOssForCausalLM(
        small(GptOssConfig, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STRANGERS)
def test_a_family_that_computes_something_else_is_refused_and_its_base_left_alone(name, dtype):
    base = tiny_base()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = STRANGERS[name]().eval().requires_grad_(False).to(dtype)
    base = replace(base, model=model)
    before = state_of(model)
    trial = tiny_trial(DATA)
    with pytest.raises(ModelError, match=rf"{name}(ForCausalLM|Attention) .* --engine reference"):
        pack([trial], [DATA], base=base, shape=shape_for([trial]))
    assert_unchanged(model, before)


def state_of(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[type], str | None, Tensor]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    return tensors, kinds, model.config._attn_implementation, _logits(model)


def assert_unchanged(model: PreTrainedModel, before: Any) -> None:
    tensors, kinds, attention, logits = state_of(model)
    assert list(tensors) == list(before[0])
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert (kinds, attention) == (before[1], before[2])
    assert torch.equal(logits, before[3])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 24)[None]).logits

"""DoRA against its formula, its magnitudes in float32, and weights without a direction."""

from typing import Any, cast

import pytest
import torch

from loratune.errors import ModelError
from loratune.methods.dora import METHOD
from loratune.models.targets import target_modules
from methods.trials import make_optimizer, make_trial, run_updates
from tiny_models import tiny_model

UP = "model.layers.1.mlp.up_proj"


def attach(model: Any, **changes: Any):
    trial = make_trial("dora", **changes)
    return METHOD.attach(model, trial, targets=target_modules(model, trial.targets)), trial


def test_a_trained_layer_is_magnitude_times_direction():
    attached, trial = attach(tiny_model("llama"), learning_rate=2e-2)
    run_updates(attached, make_optimizer(attached, trial), range(5))
    layer: Any = attached.model.get_submodule(f"base_model.model.{UP}")
    moved = layer.base_layer.weight + trial.scale * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    m = layer.lora_magnitude_vector["default"].weight
    direction = moved / moved.square().sum(dim=1, keepdim=True).sqrt()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ (m[:, None] * direction).T, atol=1e-5, rtol=1e-5)
    assert not torch.equal(m, layer.base_layer.weight.norm(dim=1))  # it has learned


def test_magnitudes_over_a_bfloat16_base_are_its_row_norms_in_float32():
    model: Any = cast("Any", tiny_model("llama")).to(torch.bfloat16)
    expected = model.get_submodule(UP).weight.double().square().sum(dim=1).sqrt()
    attached, _ = attach(model)
    layer: Any = attached.model.get_submodule(f"base_model.model.{UP}")
    m = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(m.double(), expected, atol=0, rtol=1e-6)


def test_a_row_of_zeros_is_an_error_that_names_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(f"{UP}.weight")[3] = 0
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has a row of zeros"):
        attach(model)
    attach(model, targets=("q_proj",))

"""DoRA against its formula, its magnitudes in float32, and weights without a direction."""

from typing import Any, cast

import pytest
import torch

from loratune.errors import ModelError
from loratune.methods.dora import METHOD, row_norms
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


def direct_norms(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """In float64, each adapter's moved weight written out."""
    moved = weight.double() + scale.double()[:, None, None] * (b.double() @ a.double())
    return moved.square().sum(dim=2).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 64), (24, 160)])
def test_row_norms_are_those_of_the_moved_weights(num_out, num_in, dtype):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    a = torch.randn(3, 8, num_in, generator=generator)
    b = torch.randn(3, num_out, 8, generator=generator)
    b[1] = 0  # an adapter that has not moved yet
    scale = torch.tensor([0.25, 1.0, 4.0])
    norm2 = weight.float().square().sum(dim=1)
    norms = row_norms(weight, a, b, scale, norm2)
    assert (norms.dtype, norms.shape) == (torch.float32, (3, num_out))
    # float32 sums of some hundred terms without much cancellation.
    expected = direct_norms(weight, a, b, scale)
    torch.testing.assert_close(norms.double(), expected, atol=0, rtol=1e-5)
    # Where B is zero, only the root of a square is between them.
    unmoved = weight.float().square().sum(dim=1).sqrt()
    torch.testing.assert_close(norms[1], unmoved, atol=0, rtol=2e-7)


def test_row_norms_of_adapters_do_not_touch_and_are_no_part_of_the_gradient():
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(16, 32, generator=generator)
    a = torch.randn(2, 4, 32, generator=generator).requires_grad_()
    b = torch.randn(2, 16, 4, generator=generator).requires_grad_()
    scale, norm2 = torch.tensor([0.5, 2.0]), weight.square().sum(dim=1)
    norms = row_norms(weight, a, b, scale, norm2)
    assert not norms.requires_grad
    with torch.no_grad():
        a[1] = torch.nan
    assert torch.equal(row_norms(weight, a, b, scale, norm2)[0], norms[0])


def test_a_row_that_the_adapter_takes_away_has_a_norm_near_zero_and_not_nan():
    generator = torch.Generator().manual_seed(9)
    a = torch.randn(1, 4, 32, generator=generator)
    b = torch.randn(1, 16, 4, generator=generator)
    weight = -(b @ a)[0]
    norms = row_norms(weight, a, b, torch.tensor([1.0]), weight.square().sum(dim=1))
    # The root of what float32 leaves of ||w||^2: 1e-3 of ||w||.
    assert (norms < 2e-3 * weight.norm(dim=1)).all()

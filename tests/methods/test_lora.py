"""LoRA's start, its scale, and the exact invariance of AdamW under a rescaling of its factors."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from loratune.methods import load_method
from loratune.methods.base import ParameterGroup
from loratune.methods.lora import METHOD
from loratune.methods.peft_adapter import short_names
from loratune.models.targets import target_modules
from loratune.records import Trial
from methods.trials import logits_of, make_trial, run_updates
from tiny_models import tiny_model


def start(method: str = "lora", *, family: str = "llama", **changes: Any):
    model = tiny_model(family)
    trial = make_trial(method, **changes)
    return load_method(method).attach(
        model, trial, targets=target_modules(model, trial.targets)
    ), trial


# PEFT asks transformers for a property that was renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_is_uniform_within_the_bounds_that_peft_draws_from_and_b_is_zero():
    attached, _ = start(rank=16, alpha=16.0)
    group_a, group_b = attached.parameter_groups()
    assert not any(parameter.any() for parameter in group_b.parameters)
    for parameter in group_a.parameters:
        # kaiming_uniform_(a=sqrt(5)): gain sqrt(2/6), bound gain sqrt(3/fan_in) = 1/sqrt(fan_in).
        bound = parameter.shape[1] ** -0.5
        assert 0.95 * bound < parameter.abs().max() <= bound
        # 512 draws or more: the mean's deviation is below bound/sqrt(3 * 512), the square's alike.
        assert parameter.mean().abs() < 0.1 * bound
        assert parameter.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.15)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = get_peft_model(tiny_model("llama"), config)
    drawn = [one for name, one in theirs.named_parameters() if "lora_A" in name]
    for ours, their in zip(group_a.parameters, drawn, strict=True):
        assert their.abs().max().item() == pytest.approx(ours.abs().max().item(), rel=0.05)


def test_layers_of_equal_shape_start_apart():
    parameters = start()[0].parameter_groups()[0].parameters
    for index, one in enumerate(parameters):
        assert not any(
            torch.equal(one, other) for other in parameters[:index] if other.shape == one.shape
        )


def test_the_layer_adds_the_trials_scale_times_b_a_x():
    for method, expected in (("lora", 8 / 4), ("loraplus", 8 / 4), ("rslora", 8 / 4**0.5)):
        attached, trial = start(method)
        assert trial.scale == expected
        layer: Any = attached.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
        generator = torch.Generator().manual_seed(5)
        b = torch.randn(48, 4, generator=generator)
        layer.lora_B["default"].weight.data.copy_(b)
        x = torch.randn(3, 32, generator=generator)
        w, a = layer.base_layer.weight, layer.lora_A["default"].weight
        torch.testing.assert_close(layer(x), x @ (w + expected * b @ a).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "loraplus"])
@pytest.mark.parametrize(("p", "q"), [(2.0, 4.0), (0.25, 8.0)])
def test_rescaling_the_factors_and_their_optimizer_leaves_training_bit_equal(method, p, q):
    """(alpha, A, B, lr, eps, wd) -> (alpha/(pq), pA, qB, (p,q) lr, eps/(p,q), wd/(p,q))."""
    changes: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    plain, trial = start(method, **changes)
    losses = run_updates(plain, adamw(plain.parameter_groups(), trial), range(8))

    scaled, _ = start(method, **changes)
    groups = list[ParameterGroup]()
    for group, factor in zip(scaled.parameter_groups(), (p, q), strict=True):
        for parameter in group.parameters:
            parameter.data.mul_(factor)
        groups.append(
            replace(
                group,
                lr_factor=group.lr_factor * factor,
                eps_factor=group.eps_factor / factor,
                weight_decay_factor=group.weight_decay_factor / factor,
            )
        )
    for module in scaled.model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] /= p * q
    assert run_updates(scaled, adamw(groups, trial), range(8)) == losses
    assert torch.equal(logits_of(scaled.model), logits_of(plain.model))


def adamw(groups: list[ParameterGroup], trial: Trial) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [
            {
                "params": group.parameters,
                "lr": trial.learning_rate * group.lr_factor,
                "eps": trial.eps * group.eps_factor,
                "weight_decay": trial.weight_decay * group.weight_decay_factor,
            }
            for group in groups
        ]
    )


def test_targets_are_written_as_leaf_names_only_where_these_mean_the_same():
    model = tiny_model("llama")
    every = target_modules(model, ("q_proj", "up_proj"))
    assert short_names(model, every) == ["q_proj", "up_proj"]
    assert short_names(model, every[:-1]) == list(every[:-1])
    trial = make_trial("lora")
    attached = METHOD.attach(model, trial, targets=every[:-1])
    adapted = [name for name, one in attached.model.named_modules() if hasattr(one, "lora_A")]
    assert [name.removeprefix("base_model.model.") for name in adapted] == list(every[:-1])


def test_the_base_layer_computes_in_its_own_precision_and_the_sum_is_rounded_once():
    model = cast("Any", tiny_model("llama")).to(torch.bfloat16)
    trial = make_trial("lora")
    attached = METHOD.attach(model, trial, targets=target_modules(model, trial.targets))
    layer: Any = attached.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.base_layer(x).float() + trial.scale * x.float() @ a.T @ b.T).bfloat16()
    # Equal but for the last bit of bfloat16, where the float32 sums are ordered otherwise.
    torch.testing.assert_close(layer(x), expected, atol=0, rtol=2**-7)

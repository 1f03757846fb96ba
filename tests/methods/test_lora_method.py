"""The two ways of training a method, through PEFT's layers and as plain tensors, are one method."""

import hashlib
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loratune.errors import LoratuneError, ModelError, StudyError
from loratune.methods import load_method
from loratune.methods.base import AdamFactors, LayerTensors, Packable
from loratune.methods.lora import start_lora
from loratune.methods.lora_method import LoraMethod
from loratune.models.targets import target_modules
from loratune.records import MethodChoice, Trial
from methods.trials import METHODS, make_optimizer, make_trial, run_updates
from tiny_models import tiny_model

PACKABLE = tuple(method for method in METHODS if method != "adalora")
UP = "model.layers.1.mlp.up_proj"


def packable(method: str) -> LoraMethod:
    loaded = load_method(method)
    assert isinstance(loaded, LoraMethod)
    return loaded


def base_of(*, dtype: torch.dtype = torch.float32, family: str = "llama") -> Any:
    return cast("Any", tiny_model(family)).to(dtype)


def live_layers(attached: Any, targets: Any) -> dict[str, LayerTensors]:
    """What PEFT's layers hold, read here anew. The correction's B is the negative of B0."""
    found = dict[str, LayerTensors]()
    for name in targets:
        layer = attached.model.get_submodule(f"base_model.model.{name}")
        a, b, m = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
        taken_out = "correction" in a
        found[name] = LayerTensors(
            a["default"].weight.detach().clone(),
            b["default"].weight.detach().clone(),
            a["correction"].weight.detach().clone() if taken_out else None,
            -b["correction"].weight.detach() if taken_out else None,
            m["default"].weight.detach().clone() if "default" in m else None,
        )
    return found


def fields_of(one: LayerTensors) -> dict[str, Tensor | None]:
    names = ("a_RD", "b_ER", "a0_RD", "b0_ER", "magnitude_E")
    return {name: getattr(one, name) for name in names}


def bits_of(model: torch.nn.Module) -> list[tuple[str, int, str]]:
    return [
        (name, id(one), hashlib.sha256(one.detach().float().numpy().tobytes()).hexdigest())
        for name, one in model.named_parameters()
    ]


def test_every_built_in_method_but_adalora_is_packable():
    assert [method for method in METHODS if isinstance(load_method(method), Packable)] == list(
        PACKABLE
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("method", PACKABLE)
def test_the_start_is_what_attach_puts_in_bit_for_bit(method, family, dtype):
    model, trial = base_of(dtype=dtype, family=family), make_trial(method, seed=5)
    targets = target_modules(model, trial.targets)[::-1]  # an order that is not the model's
    started = packable(method).start(model, trial, targets=targets)
    assert list(started) == list(targets)
    attached = load_method(method).attach(model, trial, targets=targets)
    for name, there in live_layers(attached, targets).items():
        ours, theirs = fields_of(started[name]), fields_of(there)
        for key, one in ours.items():
            other = theirs[key]
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.dtype == torch.float32
                assert torch.equal(one, other), (name, key)


@pytest.mark.parametrize("method", PACKABLE)
def test_only_what_the_method_has_is_filled_and_equally_for_every_layer(method):
    model, trial = base_of(), make_trial(method)
    started = packable(method).start(model, trial, targets=target_modules(model, trial.targets))
    filled = {
        tuple(key for key, one in fields_of(layer).items() if one is not None)
        for layer in started.values()
    }
    more: dict[str, tuple[str, ...]] = {"dora": ("magnitude_E",)}
    if method in ("pissa", "milora", "olora"):
        more[method] = ("a0_RD", "b0_ER")
    assert filled == {("a_RD", "b_ER", *more.get(method, ()))}


@pytest.mark.parametrize("method", PACKABLE)
def test_exported_layers_are_the_bytes_of_export(method, tmp_path):
    model = base_of()
    trial = make_trial(method, dropout=0.1, learning_rate=1e-2)
    targets = target_modules(model, trial.targets)
    attached = load_method(method).attach(model, trial, targets=targets)
    run_updates(attached, make_optimizer(attached, trial), range(3))
    layers = live_layers(attached, targets)
    attached.export().save(tmp_path / "attached")
    attached.detach()
    packable(method).export_layers(base_of(), trial, layers).save(tmp_path / "layers")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        ours = (tmp_path / "layers" / name).read_bytes()
        assert ours == (tmp_path / "attached" / name).read_bytes()


@pytest.mark.parametrize("method", PACKABLE)
def test_an_export_does_not_follow_what_is_trained_on(method):
    model, trial = base_of(), make_trial(method)
    targets = target_modules(model, trial.targets)
    started = packable(method).start(model, trial, targets=targets)
    files = packable(method).export_layers(model, trial, started)
    before = {name: tensor.clone() for name, tensor in files.tensors.items()}
    for one in started.values():
        one.a_RD.add_(1)
        one.b_ER.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in files.tensors.items())


@pytest.mark.parametrize("method", PACKABLE)
def test_adams_factors_are_those_of_the_parameter_groups(method):
    model, trial = base_of(), make_trial(method)
    attached = load_method(method).attach(
        model, trial, targets=target_modules(model, trial.targets)
    )
    factors = packable(method).adam_factors(trial)
    assert factors == ({"B": AdamFactors(lr_factor=16.0)} if method == "loraplus" else {})
    for group in attached.parameter_groups():
        assert group.lr_factor == factors.get(group.name, AdamFactors()).lr_factor
        assert (group.eps_factor, group.weight_decay_factor) == (1.0, 1.0)


def test_a_methods_own_factors_reach_its_parameter_groups():
    own = {"A": AdamFactors(lr_factor=2.0, eps_factor=3.0), "B": AdamFactors(weight_decay_factor=4)}
    method = LoraMethod(start_lora, adam_factors_of=lambda _: own)
    model, trial = base_of(), make_trial("lora")
    attached = method.attach(model, trial, targets=target_modules(model, trial.targets))
    found = {
        group.name: (group.lr_factor, group.eps_factor, group.weight_decay_factor)
        for group in attached.parameter_groups()
    }
    assert found == {"A": (2.0, 3.0, 1.0), "B": (1.0, 1.0, 4.0)}


@pytest.mark.parametrize("method", PACKABLE)
def test_a_start_leaves_the_base_and_torchs_random_state_alone(method):
    model, trial = base_of(), make_trial(method)
    before, state = bits_of(model), torch.get_rng_state()
    packable(method).start(model, trial, targets=target_modules(model, trial.targets))
    assert bits_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", PACKABLE)
def test_training_one_start_in_place_leaves_the_next_alone(method):
    model, trial = base_of(), make_trial(method)
    targets = target_modules(model, trial.targets)
    first = packable(method).start(model, trial, targets=targets)
    kept = {name: one.a_RD.clone() for name, one in first.items()}
    for one in first.values():
        for trained in (one.a_RD, one.b_ER, one.magnitude_E):
            if trained is not None:
                trained.mul_(2).add_(1)
    second = packable(method).start(model, trial, targets=targets)
    for name, one in second.items():
        assert torch.equal(one.a_RD, kept[name])
        if one.a0_RD is not None and one.b0_ER is not None:
            assert torch.equal(one.a_RD, one.a0_RD)
            assert torch.equal(one.b_ER, one.b0_ER)


def refusal(act: Any) -> tuple[type[LoratuneError], str]:
    with pytest.raises(LoratuneError) as caught:
        act()
    return caught.type, str(caught.value)


def cases() -> list[Any]:
    wrong_scale = [(method, "scale") for method in PACKABLE]
    corrected = [(m, what) for m in ("pissa", "milora", "olora") for what in ("rank", "nan")]
    others = [("dora", "nan"), ("dora", "zeros"), ("loraplus", "ratio"), ("pissa", "niter")]
    others += [(method, "quantised") for method in ("pissa", "milora", "olora", "dora")]
    no_layer = [(method, "target") for method in PACKABLE]
    return [*wrong_scale, *corrected, *others, *no_layer]


@pytest.mark.parametrize(("method", "what"), cases())
def test_start_refuses_what_attach_refuses_in_the_same_words(method, what):
    model, trial = base_of(), make_trial(method)
    targets = target_modules(model, trial.targets)
    expected: type[LoratuneError] = StudyError
    if what == "scale":
        trial = replace(trial, scale=3.0)
    elif what == "rank":
        trial = make_trial(method, rank=17, alpha=34.0)
    elif what in ("ratio", "niter"):
        trial = replace(trial, method=MethodChoice(method, ((what, 0.0),)))
    elif what == "target":
        expected, targets = ModelError, [*targets, "model.norm"]
    elif what == "quantised":  # as bitsandbytes leaves a layer: integers, packed or not
        expected = ModelError
        packed = torch.ones(48, 32, dtype=torch.int8)
        model.get_submodule(UP).weight = torch.nn.Parameter(packed, requires_grad=False)
    else:
        expected = ModelError
        with torch.no_grad():
            weight = model.get_parameter(f"{UP}.weight")
            weight[3] = math.nan if what == "nan" else 0.0

    def start() -> None:
        packable(method).start(model, trial, targets=targets)

    def attach() -> None:
        load_method(method).attach(model, trial, targets=targets)

    before = bits_of(model)
    refused = refusal(start)
    assert refused == refusal(attach)
    assert refused[0] is expected
    assert bits_of(model) == before


def test_a_part_that_is_taken_out_keeps_its_scale_under_any_rule(tmp_path):
    """No method of ours combines the two; one of another package may."""

    def start(model: Any, trial: Trial, targets: Any) -> dict[str, LayerTensors]:
        return packable("olora").start_layers(model, trial, targets)

    method = LoraMethod(start, use_rslora=True)
    model, trial = base_of(), make_trial("rslora", rank=4, alpha=8.0)
    targets = target_modules(model, trial.targets)
    config: Any = method.attach(model, trial, targets=targets).export().config
    assert (config["r"], config["use_rslora"]) == (8, False)
    assert config["lora_alpha"] / config["r"] == trial.scale

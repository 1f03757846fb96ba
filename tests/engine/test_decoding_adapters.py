"""Adapters read into plain tensors and seated, against PEFT's merged weights; refusals."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor

from loratune.engine.decoding_adapters import AdapterBank, needs_of, read_layers
from loratune.errors import ModelError
from loratune.methods import attach_files
from loratune.methods.adapter_files import AdapterFiles, read_adapter
from loratune.methods.peft_adapter import key_of, quiet_peft
from loratune.models.targets import block_linears
from tiny_adapters import METHODS, tiny_adapter
from tiny_models import tiny_model

Q = "model.layers.0.self_attn.q_proj"


def frozen(family: str = "llama") -> Any:
    return tiny_model(family).requires_grad_(False)


def merged_by_peft(model: Any, files: AdapterFiles) -> dict[str, Tensor]:
    """float64: each adapted layer's weight with the adapter in it, as PEFT computes it."""
    attached = attach_files(model, files)
    found = dict[str, Tensor]()
    for name in block_linears(frozen()):
        layer: Any = model.get_submodule(name)
        if hasattr(layer, "lora_A"):
            base = layer.get_base_layer().weight.double()
            delta = layer.get_delta_weight("default").double()
            whole = base + delta
            if "default" in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector["default"].weight.double()
                whole = (magnitude / whole.norm(dim=1))[:, None] * whole
            found[name] = whole
    attached.detach()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_seated_adapter_is_the_weight_that_peft_merges(method: str):
    model = frozen()
    other = tiny_adapter(model, "dora", seed=1, rank=5)
    files = tiny_adapter(model, method, seed=2, rank=3, alpha=7.0)
    wanted = merged_by_peft(model, files)
    bank = AdapterBank(model, needs_of(model, [other, files]), num_seats=2)
    linears = block_linears(model)
    bank.put(1, bank.read(other))  # somebody has sat there before
    bank.put(0, bank.read(other))
    bank.put(1, bank.read(files))
    assert wanted.keys() == linears.keys()
    for group, shape in enumerate(bank.layout.groups):
        down_AKD, up_ARE = bank.factors(group)
        gain_AE = bank.gain(group)
        assert gain_AE is not None
        assert not down_AKD[bank.plain_seat].any()
        assert (gain_AE[bank.plain_seat] == 1).all()
        for member, name in enumerate(shape.names):
            ranks = slice(member * bank.layout.rank, (member + 1) * bank.layout.rank)
            low, high = shape.segments[member : member + 2]
            product = up_ARE[1, :, low:high].double().T @ down_AKD[1, ranks].double()
            whole = linears[name].weight.double() + product
            found = gain_AE[1, low:high, None].double() * whole
            # float32 factors, norms from a sum that cancels a little.
            assert (found - wanted[name]).abs().max() < 1e-5 * wanted[name].abs().max()


@pytest.mark.parametrize("method", ["pissa", "milora", "olora"])
def test_16_bits_keep_the_difference_that_a_part_of_the_base_would_round_away(method: str):
    model = frozen().to(torch.bfloat16)
    exact = frozen()
    near = barely_moved(tiny_adapter(exact, method, seed=2, rank=4))
    layers = read_layers(exact, near)
    bank = AdapterBank(model, needs_of(model, [near]), num_seats=1)
    bank.put(0, bank.read(near))
    down_AKD, up_ARE = bank.factors(0)
    name = bank.layout.groups[0].names[0]
    ranks, (low, high) = slice(0, bank.layout.rank), bank.layout.groups[0].segments[:2]
    found = up_ARE[0, :, low:high].double().T @ down_AKD[0, ranks].double()
    a_RD, b_ER = layers[name].a_RD, layers[name].b_ER
    wanted = b_ER.double() @ a_RD.double()
    as_it_is = b_ER.bfloat16().double() @ a_RD.bfloat16().double()
    error, of_halves = ((one - wanted).abs().max() for one in (found, as_it_is))
    assert error < 0.01 * wanted.abs().max()
    assert of_halves > 3 * error


def barely_moved(files: AdapterFiles) -> AdapterFiles:
    """A short training: 2% of the way from A0 and B0 to A and B, of [B, -B0] [A; A0]."""
    tensors = dict[str, Tensor]()
    for name, tensor in files.tensors.items():
        dim, sign = (0, 1) if name.endswith("lora_A.weight") else (1, -1)
        trained, frozen_half = tensor.chunk(2, dim=dim)
        start = sign * frozen_half
        tensors[name] = torch.cat([start + 0.02 * (trained - start), frozen_half], dim=dim)
    return replace(files, tensors=tensors)


# What is refused ----------------------------------------------------------------------------------


def changed(files: AdapterFiles, **config: Any) -> AdapterFiles:
    return replace(files, config={**files.config, **config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": None}, "names no target_modules"),
        ({"init_lora_weights": "pissa"}, "a base that was changed"),
        ({"bias": "all"}, "uses bias"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"r": 5}, "says rank 5 for .*q_proj, but its factors have rank 4"),
        ({"use_dora": True}, "14 of its tensors are missing .*q_proj.lora_magnitude_vector"),
    ],
)
def test_adapters_that_compute_otherwise_are_refused(config: dict[str, Any], message: str):
    model = frozen()
    files = changed(tiny_adapter(model, "lora"), **config)
    with pytest.raises(ModelError, match=message):
        read_layers(model, files)


def test_tensors_that_belong_nowhere_or_do_not_fit_are_refused():
    model = frozen()
    files = tiny_adapter(model, "lora")
    tensors = dict(files.tensors)
    lacking = {name: one for name, one in tensors.items() if name != key_of(Q, "lora_B.weight")}
    with pytest.raises(ModelError, match=f"1 of its tensors are missing .*{Q}.lora_B.weight"):
        read_layers(model, replace(files, tensors=lacking))
    head = {**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}
    with pytest.raises(ModelError, match=r"lm_head\.lora_A.* linear layers of the blocks alone"):
        read_layers(model, replace(files, tensors=head))
    narrow = {**tensors, key_of(Q, "lora_A.weight"): torch.zeros(4, 31)}
    with pytest.raises(ModelError, match=r"shapes \(4, 31\) and \(32, 4\), expected \(4, 32\)"):
        read_layers(model, replace(files, tensors=narrow))
    with pytest.raises(ModelError, match="28 of its tensors are missing"):
        read_layers(model, replace(files, tensors={}))
    dora = tiny_adapter(model, "dora")
    short = {**dora.tensors, key_of(Q, "lora_magnitude_vector"): torch.ones(3)}
    with pytest.raises(ModelError, match="has 3 magnitudes, expected 32"):
        read_layers(model, replace(dora, tensors=short))


def test_another_kind_of_adapter_is_not_seated():
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    fields = json.loads(json.dumps(config.to_dict(), default=sorted))
    with pytest.raises(ModelError, match="is of PEFT's type 'IA3', not 'LORA'"):
        read_layers(frozen(), AdapterFiles(fields, {}))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
    ],
)
def test_an_adapter_that_lacks_a_layer_it_names_is_refused_alike_by_both_ways(config, tmp_path):
    with quiet_peft():
        made = get_peft_model(tiny_model("llama"), LoraConfig(r=3, task_type="CAUSAL_LM", **config))
    made.save_pretrained(str(tmp_path))
    files = read_adapter(tmp_path)
    model = frozen()
    given = [name for name in files.tensors if name.endswith("lora_A.weight")]
    assert len(read_layers(model, files)) == len(given)
    layer = given[-1].removesuffix("lora_A.weight")
    lacking = {name: one for name, one in files.tensors.items() if not name.startswith(layer)}
    told = list[str]()
    for read in (read_layers, attach_files):
        with pytest.raises(ModelError, match=f"{2 + config.get('use_dora', False)} of its"):
            read(model, replace(files, tensors=lacking))
        try:
            read(model, replace(files, tensors=lacking))
        except ModelError as error:
            told.append(str(error))
    assert told[0] == told[1]

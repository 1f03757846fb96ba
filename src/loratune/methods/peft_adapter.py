"""PEFT's layers and file format, as every method here uses them.

PEFT gives the layers and the files; every number that an adapter starts from is put in by us, in
float32, because PEFT draws from torch's global random state and rounds what it draws to the base's
precision. How PEFT mixes precisions: the layer's input is cast to the adapter's float32, base
output and adapter output are added in float32, and the sum is rounded once to the base's. Over a
quantised base it rounds the adapter's output to 16 bits before it adds.
"""

# PEFT's classes carry no complete types; the values that leave this file do.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import hashlib
import json
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.errors import ModelError
from loratune.methods.adapter_files import AdapterFiles
from loratune.records import Trial

ADAPTER = "default"


def lora_config(
    model: PreTrainedModel, trial: Trial, targets: Sequence[str], **settings: Any
) -> LoraConfig:
    """PEFT's config of a trial's adapter; `settings` replace or add fields."""
    fields: dict[str, Any] = {
        "r": trial.rank,
        "lora_alpha": whole(trial.alpha),
        "lora_dropout": trial.dropout,
        "target_modules": short_names(model, targets),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": trial.model,
        "init_lora_weights": False,  # the numbers are put in by us
    }
    return LoraConfig(**{**fields, **settings})


def attach_peft(
    model: PreTrainedModel, config: PeftConfig, targets: Sequence[str]
) -> PeftModelForCausalLM:
    """The base with PEFT's layers in it; their numbers are still to be put in.

    Raises:
        ModelError: a target is not a linear layer of the model.
    """
    linear_layers(model, targets)
    # PEFT draws every new layer before we fill it; torch's global random state is not ours to move.
    with torch.random.fork_rng(devices=[]), quiet_peft():
        attached = PeftModelForCausalLM(model, config, adapter_name=ADAPTER)
    matched = cast("list[str]", cast("Any", attached.base_model).targeted_module_names)
    if set(matched) != set(targets):
        # Names are ours and exact: only a model that holds one path inside another gets here.
        extra = ", ".join(sorted(set(matched) ^ set(targets)))
        raise ModelError(f"PEFT matches other layers than were asked for: {extra}")
    attached.train(model.training)
    return attached


@contextmanager
def quiet_peft() -> Generator[None]:
    """Silence what PEFT 0.21 causes on transformers 5 by its own code, and says of merging."""
    with warnings.catch_warnings():
        # PeftModel asks for a property that transformers renamed; it still answers rightly.
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        # An adapter on tied embeddings: of concern to who merges it, which nothing here does.
        warnings.filterwarnings(
            "ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning
        )
        yield


def adapter_layers(attached: PeftModel, targets: Sequence[str]) -> dict[str, Any]:
    """PEFT's layer at each target, in the order of the targets."""
    base = cast("Any", attached.base_model).model
    return {name: base.get_submodule(name) for name in targets}


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the trial's seed and the tensor's name, on nothing else."""
    digest = hashlib.sha256(f"loratune:initialisation:{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def key_of(layer: str, tensor: str) -> str:
    """The name of a tensor in PEFT's files."""
    return f"base_model.model.{layer}.{tensor}"


def files_of(config: LoraConfig, tensors: Mapping[str, Tensor]) -> AdapterFiles:
    """The files of a finished adapter: its config marked for inference, its tensors copied."""
    fields = {**config.to_dict(), "inference_mode": True, "init_lora_weights": True}
    # Through JSON text and back: sets become sorted lists and enums their values.
    plain = json.loads(json.dumps(fields, default=sorted))
    return AdapterFiles(config=plain, tensors=copied(tensors))


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that nothing else writes into."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Write a state into live tensors of the same names and shapes.

    Raises:
        ModelError: names or shapes differ.
    """
    if tensors.keys() != state.keys():
        names = ", ".join(sorted(tensors.keys() ^ state.keys())[:3])
        raise ModelError(f"the state is another adapter's: it differs in {names}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ModelError(
                f"the state is another adapter's: {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
        tensor.copy_(state[name])


def trained_tensors(attached: PeftModel) -> dict[str, Tensor]:
    """Every trained parameter by its name in the model."""
    return {
        name: parameter
        for name, parameter in attached.named_parameters()
        if parameter.requires_grad
    }


def short_names(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Leaf names (q_proj, ...) where they mean exactly the targets, else the full names.

    Other programs that read PEFT's files expect leaf names.
    """
    leaves = {name.rpartition(".")[2] for name in targets}
    names: list[str] = [name for name, _ in cast("Any", model).named_modules()]
    meant = {name for name in names if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == set(targets) else list(targets)


def whole(number: float) -> float | int:
    """16 for 16.0, because other readers of PEFT's files take alpha for a whole number."""
    return int(number) if number == int(number) else number


def exact_weight(layer: nn.Linear, name: str) -> Tensor:
    """A layer's weight W_ED in float32, for a method that computes with it.

    Raises:
        ModelError: it is quantised, so that the numbers in it are not weights.
    """
    if not layer.weight.is_floating_point():
        raise ModelError(
            f"the weight of {name} is quantised ({layer.weight.dtype}); "
            "load the base in bfloat16, float16 or float32 for this method"
        )
    return layer.weight.detach().float()


def linear_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The layer of each target, by full name.

    Raises:
        ModelError: there is none of that name, or it is not linear.
    """
    layers = dict[str, nn.Linear]()
    for name in targets:
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"target {name} is no layer of {type(model).__name__}; give full names, "
                "as models.targets.target_modules does"
            ) from error
        if not isinstance(layer, nn.Linear):
            raise ModelError(f"target {name} is {type(layer).__name__}; expected a linear layer")
        layers[name] = layer
    return layers

"""Finished adapters of every method for the tiny models, as after some training. For tests only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loratune.methods import load_method
from loratune.methods.adapter_files import AdapterFiles
from loratune.models.targets import target_modules
from tiny_packs import PACKABLE
from tiny_trials import random_data, tiny_trial

METHODS = (*PACKABLE, "adalora")
DATA = random_data(24)


def tiny_adapter(
    model: Any,
    method: str,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = ("all-linear",),
) -> AdapterFiles:
    """The export of an adapter whose trained numbers have all moved from their start."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

    names = target_modules(model, targets)
    trial = tiny_trial(DATA, method=method, rank=rank, alpha=alpha, seed=seed, steps=20)
    made: Any = load_method(method)
    if method != "adalora":
        layers = {
            name: replace(
                one,
                a_RD=moved(one.a_RD),
                b_ER=moved(one.b_ER),
                magnitude_E=None if one.magnitude_E is None else moved(one.magnitude_E),
            )
            for name, one in made.start(model, trial, targets=names).items()
        }
        return made.export_layers(model, trial, layers)
    attached = made.attach(model, trial, targets=names)
    try:
        with torch.no_grad():
            for number, name in enumerate(names):
                layer: Any = model.get_submodule(name)
                values = layer.lora_E["default"]
                layer.lora_A["default"].copy_(10 * moved(layer.lora_A["default"]))
                layer.lora_B["default"].copy_(moved(layer.lora_B["default"]))
                values.copy_(moved(values))
                # Layers end with different ranks; one of them loses everything.
                values[: number % len(values)] = 0
                if number == 0:
                    values.zero_()
        return attached.export()
    finally:
        attached.detach()


def mixed_adapters(model: Any) -> dict[str, AdapterFiles | None]:
    """One adapter of each method, no two of one rank and alpha, and the plain base."""
    return {
        "plain": None,
        **{
            method: tiny_adapter(
                model, method, seed=index, rank=1 + index % 5, alpha=2.0 + 3 * (index % 3)
            )
            for index, method in enumerate(METHODS)
        },
    }

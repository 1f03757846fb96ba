"""Remembers a base model so that adapters can come and go and leave it exactly as it was.

PEFT replaces layers, hangs attributes and hooks on the model and can change its config; its own
`unload` undoes the first of these alone. Here every module's attributes, children, parameters,
buffers and hooks are remembered by identity and put back. Weights are copied only on demand: what
loratune's own methods attach may not write into them, and a test compares their bits.
"""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.errors import ModelError


class Resident:
    """What `model` looked like when this was made.

    `with_weights`: the numbers of its parameters and buffers too, copied to the CPU until
    `restore`, for adapters that PEFT writes into the base.

    Raises:
        ModelError: the model carries an adapter already.
    """

    def __init__(self, model: PreTrainedModel, *, with_weights: bool = False) -> None:
        modules = list(cast("Any", model).modules())
        if any(isinstance(module, BaseTunerLayer) for module in modules):
            raise ModelError(
                f"{type(model).__name__} carries an adapter already; detach it before the next one"
            )
        self._model = model
        self._remembered = [(owner, _copied(vars(owner))) for owner in [*modules, model.config]]
        self._weights = _weights(model) if with_weights else []

    def restore(self) -> None:
        """Put everything back and freeze every parameter. Twice is harmless."""
        for owner, attributes in self._remembered:
            _restore(vars(owner), attributes)
        for tensor, storage, numbers in self._weights:
            tensor.data = storage
            storage.copy_(numbers)
        self._weights = []
        parameters: list[nn.Parameter] = list(cast("Any", self._model).parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


# An attribute's value and, where it is a dict or a set (torch keeps children, parameters, buffers
# and hooks in such), a copy of what is in it: handles to hooks hold on to the container itself.
_Attributes = dict[str, tuple[Any, Any]]


def _weights(model: PreTrainedModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each tensor of the model, where its numbers lie, and the numbers, on the CPU."""
    tensors: list[Tensor] = [*cast("Any", model).parameters(), *cast("Any", model).buffers()]
    return [
        (one, one.data, torch.empty_like(one.data, device="cpu").copy_(one.data)) for one in tensors
    ]


def _copied(attributes: dict[str, Any]) -> _Attributes:
    return {
        name: (value, value.copy() if isinstance(value, dict | set) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], remembered: _Attributes) -> None:
    attributes.clear()
    for name, (value, content) in remembered.items():
        attributes[name] = value
        if content is not None:
            value.clear()
            value.update(content)

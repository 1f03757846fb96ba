"""The linear layers of a loaded model that a study's `targets` mean, by their full names.

Only the decoder blocks are looked at: the output head and the embeddings are never targets. The
rules of matching are those of `loratune.planning.targets`, which knows no torch.
"""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from loratune.errors import ModelError
from loratune.planning.targets import check_rank_of_layer, check_targets, means


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear inside the decoder blocks, by full dotted name, in model order.

    The names are those that PEFT matches `target_modules` against.

    Raises:
        ModelError: the model has no list of blocks.
    """
    modules = dict(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))
    blocks = _name_of_blocks(model)
    return {
        name: module
        for name, module in modules.items()
        if name.startswith(f"{blocks}.") and isinstance(module, nn.Linear)
    }


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks, in order.

    Raises:
        ModelError: the model has no list of blocks.
    """
    blocks = model.get_submodule(_name_of_blocks(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _name_of_blocks(model: nn.Module) -> str:
    """The model's only nn.ModuleList, or its longest outermost one: `model.layers` in every
    supported family.
    """
    modules = dict(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{one}.") for one in lists)]
    if not outermost:
        raise ModelError(
            f"{type(model).__name__} keeps its blocks in no nn.ModuleList; "
            "expected a decoder of the Llama kind"
        )
    return max(outermost, key=lambda name: len(list(modules[name].children())))


def target_modules(model: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """Full names of the linear layers that the targets mean, in model order, each once.

    Args:
        model: the base model, before any adapter is attached to it.

    Raises:
        ModelError: a target that matches no layer; the message lists the names there are and the
            nearest.
    """
    names = tuple(block_linears(model))
    check_targets(targets, names, source=_source_of(model))
    return tuple(name for name in names if any(means(target, name) for target in targets))


def check_rank(model: nn.Module, targets: Sequence[str], *, rank: int) -> None:
    """Refuse a rank above the smaller side of a target layer of a loaded model.

    Raises:
        ModelError: the rank is too large for a layer, which the message names; or a target matches
            no layer.
    """
    linears = block_linears(model)
    for name in target_modules(model, targets):
        linear = linears[name]
        check_rank_of_layer(name, linear.in_features, linear.out_features, rank=rank)


def _source_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)

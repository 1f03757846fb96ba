"""Which linear layers a study's `targets` mean, decided on names and shapes alone. No torch.

`models.targets` applies the same rules to the layers of a loaded model. A target is `all-linear`
(every linear layer of the decoder blocks, never the output head), a layer's own name (`q_proj`),
or the last parts of its dotted name (`self_attn.q_proj`, `layers.0.mlp.up_proj`).
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loratune.errors import ModelError
from loratune.records import LinearShape, ModelFacts

ALL_LINEAR = "all-linear"
# Layers of these names read the same input wherever they stand side by side.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def means(target: str, name: str) -> bool:
    """Whether `target` means the linear layer of dotted name `name`."""
    return target in (ALL_LINEAR, name) or name.endswith(f".{target}")


def own_name(name: str) -> str:
    """The last part of a dotted name: what a layer is called within its parent."""
    return name.rpartition(".")[2]


def matched_linears(model: ModelFacts, targets: Sequence[str]) -> tuple[LinearShape, ...]:
    """The model's linear shapes that the targets mean, each with the count that they mean.

    The facts know layers by their own names only: of a dotted target the last part decides, and one
    that numbers its block (`layers.0.mlp.up_proj`) means one layer of that name.

    Raises:
        ModelError: no targets, or a target that matches no layer; the message lists the names there
            are and the nearest.
    """
    names = [linear.name for linear in model.linears]
    check_targets([own_name(target) for target in targets], names, source=model.source)
    matched = list[LinearShape]()
    for linear in model.linears:
        meant_by = {target for target in targets if means(own_name(target), linear.name)}
        numbered = {target for target in meant_by if any(p.isdigit() for p in target.split("."))}
        if meant_by - numbered:
            matched.append(linear)
        elif numbered:
            matched.append(replace(linear, count=min(len(numbered), linear.count)))
    return tuple(matched)


def check_rank(model: ModelFacts, targets: Sequence[str], *, rank: int) -> None:
    """Refuse a rank above the smaller side of a target layer.

    Raises:
        ModelError: the rank is above the width of the narrowest target layer, which the message
            names, or below 1; or a target matches no layer.
    """
    narrowest = min(
        matched_linears(model, targets), key=lambda one: min(one.in_features, one.out_features)
    )
    check_rank_of_layer(narrowest.name, narrowest.in_features, narrowest.out_features, rank=rank)


def check_rank_of_layer(name: str, in_features: int, out_features: int, *, rank: int) -> None:
    """Refuse a rank above the smaller side of one linear layer.

    Raises:
        ModelError: the rank is above min(in_features, out_features), or below 1.
    """
    width = min(in_features, out_features)
    if not 1 <= rank <= width:
        raise ModelError(
            f"rank={rank} does not fit layer {name!r} ({in_features} in, {out_features} out); "
            f"choose a rank from 1 to {width}, or leave that layer out of targets"
        )


def check_targets(targets: Sequence[str], names: Iterable[str], *, source: str) -> None:
    """Refuse a target that means none of the linear layers called `names` (dotted or own names).

    Raises:
        ModelError: no targets, no layers, or a target that matches no layer; the message lists the
            layers' own names and the nearest.
    """
    names = tuple(names)
    known = tuple(dict.fromkeys(own_name(name) for name in names))
    if not known:
        raise ModelError(f"model {source} has no linear layer in its blocks; nothing to adapt")
    listed = f"{', '.join(known)}, or {ALL_LINEAR} for every one"
    if not targets:
        raise ModelError(f"targets is empty; choose from {listed}")
    for target in targets:
        if not any(means(target, name) for name in names):
            near = difflib.get_close_matches(own_name(target), [*known, ALL_LINEAR], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ModelError(
                f"target {target!r} matches no linear layer of model {source}{hint}; "
                f"the names there are: {listed}"
            )

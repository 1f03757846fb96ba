"""Finished adapters in PEFT's format, seated beside each other so that many answer at once.

An adapter is read into plain tensors, A and scale B for each layer (and DoRA's m), whatever its
method, rank and alpha are: everything that loratune exports is a plain LoRA of the base as it
stands. A bank has seats, each a flat row as in `engine.slots`; ranks below the bank's are filled up
with zeros. Seats are written in place and are data: nothing is compiled or captured anew.

In 16 bits the two halves of an adapter that starts from a part of the base, [B, -B0] [A; A0], would
each be rounded at the size of that part, and their difference is what counts. The same product is

    [B1, B2] [A1; A2] = [B1 + B2, -B2] [A1; A1 - A2]

and where that has the smaller numbers, it is what is seated.

Refused: adapters with anything but LoRA factors and magnitudes on linear layers of the blocks
(biases, embeddings, whole modules, the output head), and those whose base was changed.

Legend: A seats, D in, E out, R rank.
"""

# torch and PEFT are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.engine.memory import sent
from loratune.engine.packed_model import group_targets
from loratune.engine.slots import lay_out, to_row, views
from loratune.errors import ModelError
from loratune.methods.adapter_files import MAGNITUDE, AdapterFiles, all_finite, read_adapter
from loratune.methods.attach_files import check_complete, lora_config_of
from loratune.methods.base import LayerTensors
from loratune.methods.dora import row_norms
from loratune.methods.peft_adapter import key_of
from loratune.models.targets import block_linears

# An adapter that answers: in memory, a folder in PEFT's format, or the plain base.
Adapter = AdapterFiles | Path | None

# Fields of PEFT's config with which an adapter is not W x + scale B A x, or not on linear layers.
COMPUTES_OTHERWISE = (
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


def read_layers(model: PreTrainedModel, adapter: AdapterFiles | Path) -> dict[str, LayerTensors]:
    """Each layer's A, scale B and, for DoRA, m in float32: y = W x + B A x.

    Args:
        model: the base, without an adapter.
        adapter: as `methods.attach_files` takes it.

    Raises:
        ModelError: the files are missing, damaged or a pickle; it is another kind of adapter; it
            does not fit this base.
    """
    files = read_adapter(adapter) if isinstance(adapter, Path) else adapter
    where = str(adapter) if isinstance(adapter, Path) else "the adapter"
    config = lora_config_of(files, where=where)
    _check_config(config, where=where)
    targets = _targets(model, config, where=where)
    missing = [name for of_one in targets.values() for name in of_one if name not in files.tensors]
    check_complete(missing, where=where)
    left = dict(files.tensors)
    layers = dict[str, LayerTensors]()
    for name, linear in block_linears(model).items():
        if name not in targets:
            continue
        a_RD, b_ER, *of_dora = (left.pop(wanted) for wanted in targets[name])
        magnitude_E = of_dora[0] if of_dora else None
        rank = len(a_RD)
        shapes = [(rank, linear.in_features), (linear.out_features, rank)]
        if [tuple(a_RD.shape), tuple(b_ER.shape)] != shapes:
            raise ModelError(
                f"{where} does not fit this base: {name} has factors of shapes "
                f"{tuple(a_RD.shape)} and {tuple(b_ER.shape)}, expected {shapes[0]} and "
                f"{shapes[1]}; give the base it was trained on"
            )
        if magnitude_E is not None and magnitude_E.numel() != linear.out_features:
            raise ModelError(
                f"{where} does not fit this base: {name} has {magnitude_E.numel()} magnitudes, "
                f"expected {linear.out_features}; give the base it was trained on"
            )
        scale = _scale_of(config, name, rank=rank, where=where)
        layers[name] = LayerTensors(
            a_RD=a_RD.float(),
            b_ER=scale * b_ER.float(),
            magnitude_E=None if magnitude_E is None else magnitude_E.float().flatten(),
        )
    if left or not layers:
        names = ", ".join(list(left)[:3]) or "no tensor at all"
        raise ModelError(
            f"{where} does not fit this base: {names}; many adapters at once have LoRA tensors on "
            "linear layers of the blocks alone; give the base it was trained on, or evaluate it by "
            "itself"
        )
    return layers


def _check_config(config: LoraConfig, *, where: str) -> None:
    fields = config.to_dict()
    given = [name for name in COMPUTES_OTHERWISE if fields.get(name)]
    if given:
        raise ModelError(
            f"{where} uses {', '.join(given)}, which many adapters at once do not; evaluate it by "
            "itself"
        )


def _targets(
    model: PreTrainedModel, config: LoraConfig, *, where: str
) -> dict[str, tuple[str, ...]]:
    """Each layer that a configuration means, by PEFT's own matching, and its tensors in a file.

    A layer whose tensors a file lacks would else answer as the base does.
    """
    if config.target_modules is None:  # PEFT then takes what it likes for the family.
        raise ModelError(
            f"{where} names no target_modules, which many adapters at once need; evaluate it by "
            "itself"
        )
    linears = block_linears(model)
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    # PEFT writes the layers' own names in its place; other programs may not.
    everywhere = config.target_modules == "all-linear"
    found = dict[str, tuple[str, ...]]()
    for name, module in modules:
        if not (name in linears if everywhere else check_target_module_exists(config, name)):
            continue
        factors = ["lora_A.weight", "lora_B.weight"]
        if isinstance(module, nn.Embedding):
            factors = ["lora_embedding_A", "lora_embedding_B"]
        if config.use_dora:
            factors.append(MAGNITUDE)
        found[name] = tuple(key_of(name, one) for one in factors)
    return found


def _scale_of(config: LoraConfig, name: str, *, rank: int, where: str) -> float:
    """alpha/r or alpha/sqrt(r), alpha and r by the layer's own patterns where it has some."""
    ranks: dict[str, int] = {**(config.rank_pattern or {})}
    alphas: dict[str, float] = {**(config.alpha_pattern or {})}
    declared = ranks.get(get_pattern_key(list(ranks), name), config.r)
    if declared != rank:
        raise ModelError(
            f"{where} says rank {declared} for {name}, but its factors have rank {rank}; export "
            "the adapter anew"
        )
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a bank must hold: the layers that any adapter has, and the largest rank.

    `not_finite` are the places of adapters with a NaN or infinite weight: nobody asks them.
    """

    targets: tuple[str, ...]
    rank: int
    magnitudes: bool
    not_finite: frozenset[int]


def needs_of(model: PreTrainedModel, adapters: Sequence[AdapterFiles | Path]) -> Needs:
    """Reads every adapter once, and so refuses what cannot be seated before anything runs.

    Raises:
        ModelError: see `read_layers`.
    """
    names, rank, magnitudes = set[str](), 1, False
    not_finite = set[int]()
    for place, adapter in enumerate(adapters):
        layers = read_layers(model, adapter)
        names |= layers.keys()
        rank = max(rank, *(len(one.a_RD) for one in layers.values()))
        magnitudes |= any(one.magnitude_E is not None for one in layers.values())
        if not all_finite(tensor for one in layers.values() for tensor in _tensors(one)):
            not_finite.add(place)
    ordered = tuple(name for name in block_linears(model) if name in names)
    return Needs(ordered, rank, magnitudes, frozenset(not_finite))


def _tensors(layer: LayerTensors) -> tuple[Tensor, ...]:
    of_dora = () if layer.magnitude_E is None else (layer.magnitude_E,)
    return (layer.a_RD, layer.b_ER, *of_dora)


def seat_bytes(model: PreTrainedModel, needs: Needs) -> int:
    """Bytes of one seat of a bank that holds these."""
    groups = group_targets(model, needs.targets, apart=False)
    layout = lay_out(groups, rank=needs.rank, magnitudes=needs.magnitudes)
    _, end, size = layout.ends
    return end * model.dtype.itemsize + 4 * (size - end)


@dataclass(frozen=True, slots=True, eq=False)
class SeatRow:
    """An adapter as a bank takes it: its factors in a flat row, and its layers in float32."""

    factors_P: Tensor
    layers: Mapping[str, LayerTensors]


class AdapterBank:
    """Seats for `num_seats` adapters, and one more, the last, in which nobody ever sits.

    Attributes:
        layout: where each group of layers has its numbers in a seat's row.
        factors_AP: what layers multiply with, in the base's precision.
        gain_AE: float32, DoRA's m / norm, one for every other method; None where no adapter needs
            it.
    """

    def __init__(self, model: PreTrainedModel, needs: Needs, *, num_seats: int) -> None:
        device = model.device
        groups = group_targets(model, needs.targets, apart=False)
        self.layout = lay_out(groups, rank=needs.rank, magnitudes=needs.magnitudes)
        self.num_seats = num_seats
        _, end, size = self.layout.ends
        self.factors_AP = torch.zeros(num_seats + 1, end, dtype=model.dtype, device=device)
        self.gain_AE = (
            torch.ones(num_seats + 1, size - end, dtype=torch.float32, device=device)
            if needs.magnitudes
            else None
        )
        self._model = model
        linears = block_linears(model)
        # By name: the layers themselves are replaced while the bank is in use.
        self._linears = {name: linears[name] for name in needs.targets}
        self._square_norms = dict[str, Tensor]()

    @property
    def plain_seat(self) -> int:
        """The seat of the base without an adapter: all its numbers are zero."""
        return self.num_seats

    @torch.no_grad()
    def read(self, adapter: AdapterFiles | Path) -> "SeatRow":
        """What a seat takes of an adapter, on the CPU; the bank is not touched, by any thread.

        Raises:
            ModelError: see `read_layers`.
        """
        layers = read_layers(self._model, adapter)
        for name, linear in self._linears.items():
            layers.setdefault(name, _nothing(linear))
        dtype = self.factors_AP.dtype
        exact = layers if dtype == torch.float32 else _by_smaller_numbers(layers)
        row_P = to_row(exact, self.layout)[: self.layout.ends[1]]
        # Rounded here: half as much goes to the device.
        return SeatRow(row_P.to(dtype), layers)

    @torch.no_grad()
    def put(self, seat: int, row: "SeatRow") -> None:
        """Put an adapter into a seat, over whoever sat there."""
        self.factors_AP[seat].copy_(sent(row.factors_P, self.factors_AP.device))
        if self.gain_AE is not None:
            self.gain_AE[seat] = 1
            self._gain(seat, row.layers)

    def _gain(self, seat: int, layers: Mapping[str, LayerTensors]) -> None:
        assert self.gain_AE is not None
        device = self.gain_AE.device
        for group, shape in enumerate(self.layout.groups):
            first = self.layout.m_offsets[group] - self.layout.ends[1]
            for member, name in enumerate(shape.names):
                layer = layers[name]
                if layer.magnitude_E is None:
                    continue
                weight = self._linears[name].weight
                if name not in self._square_norms:
                    self._square_norms[name] = weight.float().square().sum(dim=1)
                norm_1E = row_norms(
                    weight,
                    sent(layer.a_RD, device)[None],
                    sent(layer.b_ER, device)[None],
                    torch.ones(1, device=device),
                    self._square_norms[name],
                )
                low, high = shape.segments[member : member + 2]
                outputs = slice(first + low, first + high)
                self.gain_AE[seat, outputs] = sent(layer.magnitude_E, device) / norm_1E[0]

    def factors(self, group: int) -> tuple[Tensor, Tensor]:
        """A group's A x K x D and A x R x E."""
        part = views(self.factors_AP, self.layout, group)
        return part.down_AKD, part.up_ARE

    def gain(self, group: int) -> Tensor | None:
        """A group's part of `gain_AE`."""
        if self.gain_AE is None:
            return None
        shape = self.layout.groups[group]
        first = self.layout.m_offsets[group] - self.layout.ends[1]
        return self.gain_AE[:, first : first + sum(shape.out_features)]


def _nothing(linear: nn.Linear) -> LayerTensors:
    """A layer that an adapter leaves alone: rank 0."""
    return LayerTensors(torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0))


def _by_smaller_numbers(layers: dict[str, LayerTensors]) -> dict[str, LayerTensors]:
    """The same products; see the module's docstring. An adapter starts alike in all its layers."""
    kept = next(one for one in layers.values() if len(one.a_RD))
    if len(kept.a_RD) % 2:
        return layers
    (a1, a2), (b1, b2) = kept.a_RD.chunk(2), kept.b_ER.chunk(2, dim=1)
    as_it_is = a1.norm() * b1.norm() + a2.norm() * b2.norm()
    as_differences = a1.norm() * (b1 + b2).norm() + (a1 - a2).norm() * b2.norm()
    if bool(as_differences >= as_it_is):
        return layers
    return {
        name: one if len(one.a_RD) % 2 else _as_differences(one) for name, one in layers.items()
    }


def _as_differences(layer: LayerTensors) -> LayerTensors:
    (a1, a2), (b1, b2) = layer.a_RD.chunk(2), layer.b_ER.chunk(2, dim=1)
    return replace(layer, a_RD=torch.cat([a1, a1 - a2]), b_ER=torch.cat([b1 + b2, -b2], dim=1))

"""A base model under the adapters of many slots: installed on a resident base, and taken off again.

transformers' own model code runs: its linear layers are replaced by packed ones, its attention by
one that knows where rows begin and end, and its decoder blocks are compiled one by one on CUDA
(they share their code: one is compiled, the others reuse it). Before anything is trained the packed
model's logits are held against the base's own, two rows end to end against each row alone: a family
that computes otherwise is refused, not trained wrongly.

Legend: M tokens of a step, V vocabulary.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from loratune.data.rows import lay_end_to_end
from loratune.engine.attention import NAME, has_row_attention
from loratune.engine.head import Targets, head_losses
from loratune.engine.laying import StepRows, lay_out_step
from loratune.engine.memory import sent
from loratune.engine.packed_linear import Dropout, PackedGroup, PackedLinear, StepRouting
from loratune.engine.routing import alignment, route
from loratune.engine.slots import GroupShape, Slots, views
from loratune.errors import ModelError
from loratune.methods.resident import Resident
from loratune.models.targets import block_linears, decoder_blocks

# Layers of these names read the same input wherever they stand side by side.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# CUDA kernels work on so many outputs at a time, which must not cross two members of a group.
OUTPUTS_PER_BLOCK = 64
# How far the packed logits may lie from the base's own, relative to their largest: rounding.
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class StepSize:
    """Sizes that every step is filled up to, so that what is compiled once serves all steps.

    None: every step is as large as its rows.
    """

    num_tokens: int
    num_rows: int


class PackedModel:
    """The base with every slot's adapter in it. Made by `installed`, which takes it off again."""

    def __init__(
        self,
        model: PreTrainedModel,
        slots: Slots,
        step: StepRouting,
        *,
        longest_row: int,
        compiled: bool,
    ) -> None:
        self._model = model
        self._slots = slots
        self._step = step
        self._longest_row = longest_row
        self._compiled = compiled
        self._device = slots.params_AP.device
        head: Any = model.get_output_embeddings()
        self._head_VD: Tensor = head.weight
        self._head_bias: Tensor | None = getattr(head, "bias", None)

    def train_step(self, rows: StepRows, *, into_A: Tensor, size: StepSize | None = None) -> None:
        """Forward and backward: gradients go to the slots' buffers, loss sums to `into_A`.

        Each slot's summed token losses in nats, unweighted, are added to float64 `into_A`.
        """
        hidden_MD, targets = self._hidden(rows, size)
        nll_L, grad_MD = head_losses(
            hidden_MD.detach(),
            self._head_VD,
            self._head_bias,
            targets,
            with_gradient=True,
            compiled=self._compiled,
        )
        into_A.index_add_(0, targets.slots_L, nll_L.to(into_A.dtype))
        assert grad_MD is not None
        torch.autograd.backward(hidden_MD, grad_MD)

    @torch.no_grad()
    def loss_sum(self, rows: StepRows, *, size: StepSize | None = None) -> Tensor:
        """float64: the summed token losses in nats of all rows; gradients are not touched."""
        hidden_MD, targets = self._hidden(rows, size)
        nll_L, _ = head_losses(
            hidden_MD,
            self._head_VD,
            self._head_bias,
            targets,
            with_gradient=False,
            compiled=self._compiled,
        )
        return nll_L.double().sum()

    @torch.no_grad()
    def logits(self, rows: StepRows) -> Tensor:
        """float32[M, V] at every token, filler included."""
        hidden_MD, _ = self._hidden(rows, None)
        return functional.linear(hidden_MD, self._head_VD, self._head_bias).float()

    def _hidden(self, rows: StepRows, size: StepSize | None) -> tuple[Tensor, Targets]:
        """Last hidden states M x D, and where the losses fall."""
        laid = lay_out_step(
            rows,
            num_slots=self._slots.num_slots,
            alignment=alignment(self._device),
            longest_row=self._longest_row,
            num_tokens=None if size is None else size.num_tokens,
            num_rows=None if size is None else size.num_rows,
        )
        num_tokens = len(laid.input_ids)
        routing = route(
            laid.counts,
            fresh=[slot in rows.fresh for slot in range(self._slots.num_slots)],
            num_tokens=num_tokens,
            fixed_size=size is not None,
            device=self._device,
        )
        self._step.routing = routing.tensors()
        self._step.token_key_M = self._sent(laid.token_keys)
        input_ids, position_ids = self._sent(laid.input_ids), self._sent(laid.position_ids)
        where: dict[str, Any] = {"longest_row": self._longest_row}
        if has_row_attention(self._device):
            where["row_bounds"] = self._sent(laid.row_bounds)
        else:
            counts = np.diff(laid.row_bounds)
            row_of = np.repeat(np.arange(len(counts)), counts)
            within = np.arange(num_tokens) - np.repeat(laid.row_bounds[:-1], counts)
            longest = int(counts.max())
            where = {
                "longest_row": longest,
                "padded_index_M": self._sent(row_of * longest + within),
                "num_rows": len(counts),
            }
        embedded = self._model.get_input_embeddings()(input_ids[None])
        if torch.is_grad_enabled():
            # Or the first layer's backward, which collects its adapters' gradients, is not called.
            embedded.requires_grad_(True)
        output: Any = self._model.base_model(
            inputs_embeds=embedded, position_ids=position_ids[None], use_cache=False, **where
        )
        targets = Targets(
            index_L=self._sent(laid.index),
            labels_L=self._sent(laid.labels),
            slots_L=self._sent(laid.slots),
            weights_L=self._sent(laid.weights),
        )
        return output.last_hidden_state[0], targets

    def _sent(self, array: Any) -> Tensor:
        return sent(torch.from_numpy(array), self._device)


def group_targets(
    model: nn.Module, targets: Sequence[str], *, device: torch.device, dropout: bool
) -> tuple[GroupShape, ...]:
    """The target layers as groups that read one input, in model order.

    With dropout every layer is a group of its own: each drops features of its own.
    """
    linears = block_linears(model)
    left = dict.fromkeys(targets)
    groups: list[GroupShape] = []
    while left:
        first = next(iter(left))
        names = (first,) if dropout else _siblings(first, left, linears, device=device)
        for name in names:
            del left[name]
        groups.append(
            GroupShape(
                names=names,
                in_features=linears[first].in_features,
                out_features=tuple(linears[name].out_features for name in names),
            )
        )
    return tuple(groups)


def _siblings(
    name: str, left: Mapping[str, None], linears: Mapping[str, nn.Linear], *, device: torch.device
) -> tuple[str, ...]:
    parent, _, own = name.rpartition(".")
    for family in SIBLINGS:
        names = tuple(f"{parent}.{member}" for member in family)
        if own != family[0] or any(one not in left for one in names):
            continue
        members = [linears[one] for one in names]
        blocks = all(one.out_features % OUTPUTS_PER_BLOCK == 0 for one in members)
        if (
            len({(one.in_features, one.bias is None) for one in members}) == 1
            and all(type(one) is nn.Linear for one in members)
            and (blocks or device.type != "cuda")
        ):
            return names
    return (name,)


@contextmanager
def installed(
    model: PreTrainedModel,
    slots: Slots,
    *,
    keep_A: Tensor | None,
    longest_row: int,
    compile_blocks: bool,
) -> Iterator[PackedModel]:
    """The packed model, for as long as the block runs; afterwards the base is as it was.

    Args:
        model: a frozen base without adapters.
        slots: every slot's factors zero.
        keep_A: the share of features that each slot's dropout keeps; None: no trial drops any.
        longest_row: no row of any step is longer.
        compile_blocks: compile the decoder's blocks and the head's loss.

    Raises:
        ModelError: the family computes something that the packed form does not.
    """
    resident = Resident(model)
    expected = _check_rows(model)
    step = StepRouting()
    step.keep_A = keep_A
    packed = PackedModel(model, slots, step, longest_row=longest_row, compiled=compile_blocks)
    try:
        _replace_linears(model, slots, step)
        model.config._attn_implementation = NAME  # transformers' own setting
        _compare(packed, model, expected, slots)
        if compile_blocks:
            for block in decoder_blocks(model):
                block.compile(dynamic=False)
        yield packed
    finally:
        resident.restore()


def _replace_linears(model: PreTrainedModel, slots: Slots, step: StepRouting) -> None:
    linears = block_linears(model)
    for index, shape in enumerate(slots.layout.groups):
        members = [linears[name] for name in shape.names]
        factors = [views(rows, slots.layout, index) for rows in slots.factors]
        gradient = views(slots.grads_AP, slots.layout, index)
        magnitude = gradient.magnitude_AE
        at_m = slots.layout.m_offsets[index] - slots.layout.ends[1]
        outputs = slice(at_m, at_m + sum(shape.out_features))
        group = PackedGroup(
            weight_ED=_side_by_side(members),
            bias_E=None
            if members[0].bias is None
            else torch.cat([one.bias.detach() for one in members]),
            segments=shape.segments,
            downs=[one.down_AKD for one in factors],
            ups=[one.up_ARE for one in factors],
            scale_A=slots.scale_A,
            grad_down=_apart(gradient.down_AKD),
            grad_up=_apart(gradient.up_ARE),
            gain_AE=None if slots.gain_AE is None else slots.gain_AE[:, outputs],
            inverse_norm_AE=None
            if slots.inverse_norm_AE is None
            else slots.inverse_norm_AE[:, outputs],
            grad_magnitude=None if magnitude is None else _apart(magnitude),
            step=step,
            dropout=None if step.keep_A is None else Dropout(salt=index),
        )
        for member, name in enumerate(shape.names):
            parent, _, own = name.rpartition(".")
            packed = PackedLinear(members[member], group, member=member, num_members=len(members))
            setattr(model.get_submodule(parent), own, packed)


def _side_by_side(members: Sequence[nn.Linear]) -> Tensor:
    """The members' weights as one matrix; they become views of it, so that none is there twice."""
    if len(members) == 1:
        return members[0].weight.detach()
    together = torch.cat([one.weight.detach() for one in members])
    for one, part in zip(
        members, together.split([one.out_features for one in members]), strict=True
    ):
        one.weight.data = part
    return together


def _apart(view: Tensor) -> Tensor:
    """The same memory with a count of writes of its own.

    autograd refuses a saved tensor that was written to, and views share one count: the backward of
    one layer, writing its own gradients, would spoil those of the layers before it.
    """
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(
        view.untyped_storage(), view.storage_offset(), view.shape, view.stride()
    )


def _check_rows(model: PreTrainedModel) -> list[tuple[list[int], Tensor]]:
    """Two short rows of arbitrary tokens and the base's own logits for each."""
    vocabulary = int(model.config.vocab_size)
    rows = [
        [(7919 * (at + 1)) % vocabulary for at in range(11)],
        [(104729 * (at + 3)) % vocabulary for at in range(6)],
    ]
    with torch.no_grad():
        return [
            (ids, model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float())
            for ids in rows
        ]


def _compare(
    packed: PackedModel,
    model: PreTrainedModel,
    expected: Sequence[tuple[list[int], Tensor]],
    slots: Slots,
) -> None:
    ids = [row for row, _ in expected]
    last = slots.num_slots - 1
    rows = StepRows(
        rows=lay_end_to_end(ids, [[False] * len(row) for row in ids]),
        slots=np.array([0, last]),
        weights=np.zeros(2),
        keys=np.zeros(2, dtype=np.int64),
        fresh=frozenset(),
    )
    logits_MV = packed.logits(rows)
    align = alignment(logits_MV.device)
    first, second = (logits for _, logits in expected)
    # The second row begins where its slot does.
    begin = len(first) if last == 0 else -(-len(first) // align) * align
    found = torch.cat([logits_MV[: len(first)], logits_MV[begin : begin + len(second)]])
    wanted = torch.cat([first, second])
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= LOGITS_TOLERANCE[model.dtype]:
        raise ModelError(
            f"{type(model).__name__} computes something that the packed engine does not: its logits "
            f"differ by {error:.1e} of their largest; train it with --engine reference"
        )

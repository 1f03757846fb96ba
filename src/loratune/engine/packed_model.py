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

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from loratune.data.rows import lay_end_to_end
from loratune.engine.attention import NAME, where_rows_lie
from loratune.engine.head import Targets, head_losses
from loratune.engine.laying import LaidOut, StepRows, lay_out_step
from loratune.engine.memory import release_memory, sent
from loratune.engine.packed_linear import (
    BackwardWatcher,
    Dropout,
    PackedGroup,
    PackedLinear,
    StepRouting,
)
from loratune.engine.replay import Replay, ReplayPool
from loratune.engine.routing import Routing, route
from loratune.engine.slots import GroupShape, Slots, lay_out, views
from loratune.errors import ModelError
from loratune.methods.resident import Resident
from loratune.models.load import set_gradient_checkpointing
from loratune.models.targets import block_linears, decoder_blocks, target_modules
from loratune.planning.targets import SIBLINGS

# How far the packed logits may lie from the base's own, relative to their largest: rounding.
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# How far the base's own logits may lie from its head's product alone: the same one, rounded once.
HEAD_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, slots=True)
class StepSize:
    """Sizes that every step is filled up to, so that what is compiled once serves all steps.

    On CUDA it is also captured once (`engine.replay`). None: a step is as large as its rows.
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
    ) -> None:
        self._model = model
        self._slots = slots
        self._step = step
        self._longest_row = longest_row
        self._device = slots.params_AP.device
        self._lengths: list[int] = []
        self._replays: dict[tuple[StepSize, bool], Replay] = {}
        self._pool = ReplayPool(self._device) if self._device.type == "cuda" else None
        head: Any = model.get_output_embeddings()
        self._head_VD: Tensor = head.weight
        self._head_bias: Tensor | None = getattr(head, "bias", None)

    def train_step(
        self,
        rows: StepRows,
        *,
        into_A: Tensor,
        size: StepSize | None = None,
        watcher: BackwardWatcher | None = None,
    ) -> None:
        """Forward and backward: gradients go to the slots' buffers, loss sums to `into_A`.

        Each slot's summed token losses in nats, unweighted, are added to float64 `into_A`. With a
        `watcher` every group's backward is shown to it, and nothing is compiled or replayed.
        """
        if watcher is not None:
            self._step.watcher = watcher
            try:
                with (
                    torch.compiler.set_stance("force_eager")
                    if self._device.type == "cuda"
                    else nullcontext()
                ):
                    self.train_step(rows, into_A=into_A)
            finally:
                self._step.watcher = None
            return
        laid, inputs = self._laid(rows, size)
        targets = self._targets(laid)
        replay = self._replay(size, backward=True)
        if replay is not None:
            embedded_MD, hidden_MD = None, replay.forward(inputs)
        else:
            embedded_MD, hidden_MD = self._body([sent(one, self._device) for one in inputs], size)
        nll_L, grad_MD = head_losses(
            hidden_MD.detach(),
            self._head_VD,
            self._head_bias,
            targets,
            with_gradient=True,
        )
        into_A.index_add_(0, targets.slots_L, nll_L.to(into_A.dtype))
        assert grad_MD is not None
        if replay is not None:
            replay.backward(grad_MD)
        else:
            torch.autograd.grad(hidden_MD, cast("Tensor", embedded_MD), grad_MD)

    @torch.no_grad()
    def loss_sum(self, rows: StepRows, *, size: StepSize | None = None) -> Tensor:
        """float64: the summed token losses in nats of all rows; gradients are not touched."""
        laid, inputs = self._laid(rows, size)
        replay = self._replay(size, backward=False)
        if replay is not None:
            hidden_MD = replay.forward(inputs)
        else:
            _, hidden_MD = self._body([sent(one, self._device) for one in inputs], size)
        nll_L, _ = head_losses(
            hidden_MD,
            self._head_VD,
            self._head_bias,
            self._targets(laid),
            with_gradient=False,
        )
        return nll_L.double().sum()

    @torch.no_grad()
    def logits(self, rows: StepRows) -> Tensor:
        """float32[M, V] at every token, filler included."""
        _, inputs = self._laid(rows, None)
        _, hidden_MD = self._body([sent(one, self._device) for one in inputs], None)
        return functional.linear(hidden_MD, self._head_VD, self._head_bias).float()

    def _laid(self, rows: StepRows, size: StepSize | None) -> tuple[LaidOut, list[Tensor]]:
        """The step as arrays, and what the body takes of it: on the CPU, of fixed sizes."""
        laid = lay_out_step(
            rows,
            num_slots=self._slots.num_slots,
            longest_row=self._longest_row,
            num_tokens=None if size is None else size.num_tokens,
            num_rows=None if size is None else size.num_rows,
        )
        routing, self._lengths = route(
            laid.counts,
            fresh=[slot in rows.fresh for slot in range(self._slots.num_slots)],
            num_tokens=len(laid.input_ids),
            fixed_size=size is not None,
        )
        arrays = [
            np.stack([laid.input_ids, laid.position_ids]),
            np.concatenate([routing, laid.token_keys, laid.row_bounds]),
        ]
        return laid, [torch.from_numpy(one) for one in arrays]

    def _targets(self, laid: LaidOut) -> Targets:
        return Targets(
            *(
                sent(torch.from_numpy(one), self._device)
                for one in (laid.index, laid.labels, laid.slots, laid.weights)
            )
        )

    def _body(self, inputs: Sequence[Tensor], size: StepSize | None) -> tuple[Tensor, Tensor]:
        """Embedded tokens, 1 x M x D, and last hidden states, M x D."""
        tokens, whole = inputs
        num_tokens = tokens.shape[1]
        num_routing = sum(self._lengths)
        routing, keys, bounds = whole.split(
            [num_routing, num_tokens, len(whole) - num_routing - num_tokens]
        )
        self._step.routing = Routing.of(routing, self._lengths).tensors()
        self._step.token_key_M = keys
        where = where_rows_lie(bounds, num_tokens=num_tokens, longest_row=self._longest_row)
        embedded = self._model.get_input_embeddings()(tokens[:1])
        if torch.is_grad_enabled():
            # Or the first layer's backward, which collects its adapters' gradients, is not called.
            embedded.requires_grad_(True)
        output: Any = self._model.base_model(
            inputs_embeds=embedded, position_ids=tokens[1:], use_cache=False, **where
        )
        return embedded, output.last_hidden_state[0]

    def _replay(self, size: StepSize | None, *, backward: bool) -> Replay | None:
        """The captured body for steps of a size; None where nothing is captured."""
        if size is None or self._pool is None:
            return None
        key = (size, backward)
        if key not in self._replays:
            lengths = self._lengths
            nothing = StepRows(
                rows=lay_end_to_end([], []),
                slots=np.zeros(0, dtype=np.int64),
                weights=np.zeros(0),
                keys=np.zeros(0, dtype=np.int64),
                fresh=frozenset(),
            )
            _, example = self._laid(nothing, size)
            assert self._lengths == lengths
            self._replays[key] = Replay(
                lambda buffers: self._body(buffers, size),
                example,
                backward=backward,
                device=self._device,
                pool=self._pool.id,
                warming_up=self._pool.warming_up(size.num_tokens, backward=backward),
            )
        return self._replays[key]


def group_targets(
    model: nn.Module, targets: Sequence[str], *, apart: bool
) -> tuple[GroupShape, ...]:
    """The target layers as groups that read one input, in model order; each alone if `apart`."""
    linears = block_linears(model)
    left = dict.fromkeys(targets)
    groups: list[GroupShape] = []
    while left:
        first = next(iter(left))
        names = (first,) if apart else _siblings(first, left, linears)
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
    name: str, left: Mapping[str, None], linears: Mapping[str, nn.Linear]
) -> tuple[str, ...]:
    parent, _, own = name.rpartition(".")
    for family in SIBLINGS:
        names = tuple(f"{parent}.{member}" for member in family)
        if own != family[0] or any(one not in left for one in names):
            continue
        members = [linears[one] for one in names]
        if len({(one.in_features, has_bias(one), one.weight.dtype) for one in members}) == 1:
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
    gradient_checkpointing: bool = False,
) -> Generator[PackedModel]:
    """The packed model, for as long as the block runs; afterwards the base is as it was.

    Args:
        model: a frozen base without adapters.
        slots: every slot's factors zero.
        keep_A: the share of features that each slot's dropout keeps; None: no trial drops any.
        longest_row: no row of any step is longer.
        compile_blocks: compile the decoder's blocks.
        gradient_checkpointing: blocks keep their input alone for the backward pass.

    Raises:
        ModelError: the family computes something that the packed form does not.
    """
    if getattr(model.config, "attention_dropout", 0.0):
        raise ModelError(
            f"{type(model).__name__} has attention_dropout={model.config.attention_dropout:g}, "
            "which the packed engine does not draw; train it with --engine reference"
        )
    resident = Resident(model)
    expected = check_rows(model)
    step = StepRouting()
    step.keep_A = keep_A
    packed = PackedModel(model, slots, step, longest_row=longest_row)
    try:
        _replace_linears(model, slots, step)
        model.config._attn_implementation = NAME  # pyright: ignore[reportPrivateUsage]  # its setter
        _compare(packed, model, expected, slots)
        set_gradient_checkpointing(model, enabled=gradient_checkpointing)
        # Blocks checkpoint in training mode alone; no dropout of the base's own is there to begin.
        model.train(gradient_checkpointing)
        if compile_blocks:
            # One more for each size of a step, kind of block, and training or not.
            torch.compiler.reset()
            for block in decoder_blocks(model):
                block.compile(dynamic=False)
        yield packed
    finally:
        resident.restore()


def check_family(model: PreTrainedModel, *, targets: Sequence[str]) -> None:
    """Install a pack of one slot and take it off again: whether the family can be packed at all.

    Raises:
        ModelError: see `installed`.
    """
    names = target_modules(model, targets)
    layout = lay_out(group_targets(model, names, apart=False), rank=1, magnitudes=False)
    slots = Slots(layout, num_slots=1, dtype=model.dtype, device=model.device, corrected=False)
    with installed(model, slots, keep_A=None, longest_row=16, compile_blocks=False):
        pass


def _replace_linears(model: PreTrainedModel, slots: Slots, step: StepRouting) -> None:
    linears = block_linears(model)
    for index, shape in enumerate(slots.layout.groups):
        members = [linears[name] for name in shape.names]
        factors = [views(rows, slots.layout, index) for rows in slots.factors]
        gradient = views(slots.grads_AP, slots.layout, index)
        magnitude = gradient.magnitude_AE
        at_m = slots.layout.m_offsets[index] - slots.layout.ends[1]
        outputs = slice(at_m, at_m + sum(shape.out_features))
        weights, block_size = group_weights(members, shape.names)
        group = PackedGroup(
            index=index,
            weights=weights,
            block_size=block_size,
            bias_E=torch.cat([one.bias.detach() for one in members])
            if has_bias(members[0])
            else None,
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
            dropout=None
            if step.keep_A is None
            else Dropout(salt=index, device=slots.params_AP.device),
        )
        for member, name in enumerate(shape.names):
            parent, _, own = name.rpartition(".")
            packed = PackedLinear(members[member], group, member=member, num_members=len(members))
            setattr(model.get_submodule(parent), own, packed)


def has_bias(linear: nn.Linear) -> bool:
    """Whether the layer adds a bias."""
    # torch declares a Parameter, and puts None there.
    return cast("Tensor | None", linear.bias) is not None


def group_weights(
    members: Sequence[nn.Linear], names: Sequence[str]
) -> tuple[list[Tensor], int | None]:
    """A group's weights as `PackedGroup` takes them, with their block size where they are packed.

    Packed weights stay where they are: the operators unpack each member's to its place.

    Args:
        members: the layers, all of one precision.
        names: theirs, for the message.

    Raises:
        ModelError: a weight is quantised otherwise than to nf4 without double quantisation.
    """
    if members[0].weight.is_floating_point():
        return [side_by_side(members)], None
    packed, block_sizes = list[Tensor](), set[int]()
    for one, name in zip(members, names, strict=True):
        # bitsandbytes' parameter carries it; other quantised layers have none.
        state: Any = getattr(one.weight, "quant_state", None)
        if (
            state is None
            or one.weight.dtype != torch.uint8
            or state.quant_type != "nf4"
            or state.nested
            or tuple(state.shape) != (one.out_features, one.in_features)
        ):
            raise ModelError(
                f"the weight of {name} is quantised ({one.weight.dtype}), and packing unpacks "
                "nf4 without double quantisation alone; use --engine reference"
            )
        # A plain tensor: the compiler would look into bitsandbytes' own kind.
        packed += [one.weight.detach().as_subclass(Tensor), state.absmax]
        block_sizes.add(int(state.blocksize))
    (block_size,) = block_sizes
    return packed, block_size


def lay_side_by_side(model: PreTrainedModel, groups: Sequence[GroupShape]) -> None:
    """Lay each group's weights as `installed` needs them, which outlasts a pack.

    Before its slots are made: what is left at the end of a slots' segment would take such a weight,
    and the allocator could never give that segment back. Quantised weights stay where they are.
    """
    linears = block_linears(model)
    for shape in groups:
        members = [linears[name] for name in shape.names]
        if members[0].weight.is_floating_point():
            side_by_side(members)
    if model.device.type == "cuda":
        # As much is left behind: 8 GiB of a 7B model.
        release_memory(model.device)


def side_by_side(members: Sequence[nn.Linear]) -> Tensor:
    """The members' weights as one matrix; they become views of it, so that none is there twice."""
    weights = [one.weight.detach() for one in members]
    first = weights[0]
    at = first.data_ptr()
    for weight in weights:
        # In one allocation: weights that a file's reader made can lie side by side by chance.
        together = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if weight.data_ptr() != at or not together or not weight.is_contiguous():
            break
        at += weight.numel() * weight.element_size()
    else:
        # An earlier pack has laid them so.
        height = sum(len(weight) for weight in weights)
        return first.as_strided((height, first.shape[1]), first.stride())
    joined = torch.cat(weights)
    heights = [one.out_features for one in members]
    for one, part in zip(members, joined.split(heights), strict=True):
        one.weight.data = part
    return joined


def _apart(view: Tensor) -> Tensor:
    """The same memory with a count of writes of its own.

    autograd refuses a saved tensor that was written to, and views share one count: the backward of
    one layer, writing its own gradients, would spoil those of the layers before it.
    """
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(
        view.untyped_storage(), view.storage_offset(), view.shape, view.stride()
    )


def check_rows(model: PreTrainedModel) -> list[tuple[list[int], Tensor]]:
    """Two short rows of arbitrary tokens and the base's own logits for each.

    Raises:
        ModelError: logits are not what the head makes of the last hidden states. That is looked at
            apart, and in any precision closely: against rounding of all layers in 16 bits, a scale
            or a soft cap could pass.
    """
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        raise ModelError(
            f"{type(model).__name__} caps its logits (final_logit_softcapping={cap:g}), which "
            "packing does not do; use --engine reference"
        )
    vocabulary = int(model.config.vocab_size)
    rows = [
        [(7919 * (at + 1)) % vocabulary for at in range(11)],
        [(104729 * (at + 3)) % vocabulary for at in range(6)],
    ]
    head: Any = model.get_output_embeddings()
    hidden = list[Tensor]()
    handle = model.base_model.register_forward_hook(
        lambda _, __, output: hidden.append(output.last_hidden_state)
    )
    expected = list[tuple[list[int], Tensor]]()
    try:
        with torch.no_grad():
            for ids in rows:
                ids_1T = torch.tensor([ids], device=model.device)
                logits_TV = model(input_ids=ids_1T).logits[0].float()
                error = furthest(head(hidden.pop())[0].float(), logits_TV)
                if not error <= HEAD_TOLERANCE[model.dtype]:
                    raise ModelError(
                        f"{type(model).__name__} does more to its logits than its head, which "
                        f"packing does not (they differ by {error:.1e} of their largest); use "
                        "--engine reference"
                    )
                expected.append((ids, logits_TV))
    finally:
        handle.remove()
    return expected


def furthest(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest of what is wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max())


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
    first, second = (logits for _, logits in expected)
    found = logits_MV[: len(first) + len(second)]
    wanted = torch.cat([first, second])
    error = furthest(found, wanted)
    if not error <= LOGITS_TOLERANCE[model.dtype]:
        raise ModelError(
            f"{type(model).__name__} computes something that the packed engine does not: its "
            f"logits differ by {error:.1e} of their largest; train it with --engine reference"
        )

"""A base model that answers under many adapters at once: installed on a resident base, taken off.

transformers' own model code runs, as in training (`engine.packed_model`): linear layers are
replaced by packed ones over a bank of finished adapters, attention by one that keeps keys and
values in slots. Three things run: prompts end to end (they fill slots and give a first token), a
step (one more token of every row), and rows end to end whose tokens are scored.

What the next step needs stays on the device: each slot's latest token, its length, how it samples.
A step is told only which rows are in it, in the order of their seats, and nothing is read back for
it. On CUDA, prompts and steps are captured for a few sizes each and filled up with filler; filler
has a slot of its own, the last, and the seat of nobody.

Before it answers, its logits are held against the base's own, prompt and steps: a family that
computes otherwise is refused.

Legend: M tokens, B rows, S slots, V vocabulary, D hidden width.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from loratune.data.rows import EncodedRows
from loratune.engine.attention import where_rows_lie
from loratune.engine.decoding_adapters import AdapterBank
from loratune.engine.decoding_attention import NAME, CacheShape, cache_on
from loratune.engine.decoding_choice import Sampling, drawn, likeliest, or_not_finite
from loratune.engine.decoding_linear import DecodingGroup
from loratune.engine.laying import LaidOut, StepRows, lay_out_step, most_filler_rows
from loratune.engine.memory import release_memory, sent
from loratune.engine.packed_linear import PackedLinear, StepRouting
from loratune.engine.packed_model import (
    LOGITS_TOLERANCE,
    check_rows,
    furthest,
    has_bias,
    side_by_side,
)
from loratune.engine.replay import Replay
from loratune.engine.routing import route
from loratune.errors import ModelError
from loratune.methods.resident import Resident
from loratune.models.targets import block_linears
from loratune.planning.packing import logit_rows

# What is captured on CUDA: steps of all slots, of half of them, ... of at least so many;
FEWEST_ROWS = 8
# and prompts of all tokens or a part of them, in rows of so many tokens in the mean or more.
PARTS_OF_PROMPTS = (1, 4, 16)
SHORT_PROMPT = 16
# A check's rows have up to 11 tokens; so many of them come step by step.
CHECK_TOKENS = 16
CHECK_STEPS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A row that begins: its tokens (int32), its adapter's seat, its slot, how it samples."""

    ids: NDArray[np.int32]
    seat: int
    slot: int
    sampling: Sampling | None
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class DecoderSize:
    """What is allocated: `num_slots` rows at once, each of at most `room` tokens with its answer.

    `longest_prompt` tokens at most has any prompt, and `tokens_per_prefill` tokens of prompts go
    through the model at once. `num_keys` is the longest answer of a row that samples, or 0.
    """

    num_slots: int
    room: int
    longest_prompt: int
    tokens_per_prefill: int
    num_keys: int = 0


class _State:
    """What every slot's next step needs; the last slot is filler's."""

    def __init__(self, size: DecoderSize, device: torch.device) -> None:
        num = size.num_slots + 1
        self.token_S = torch.zeros(num, dtype=torch.int64, device=device)
        self.length_S = torch.zeros(num, dtype=torch.int64, device=device)
        self.count_S = torch.zeros(num, dtype=torch.int64, device=device)
        self.temperature_S = torch.zeros(num, dtype=torch.float32, device=device)
        self.top_p_S = torch.ones(num, dtype=torch.float32, device=device)
        self.key_ST = torch.zeros(num, max(1, size.num_keys), dtype=torch.int32, device=device)


class DecodingModel:
    """The base with every seat's adapter in it. Made by `installed_decoder`."""

    def __init__(
        self, model: PreTrainedModel, bank: AdapterBank, step: StepRouting, size: DecoderSize
    ) -> None:
        self._model = model
        self._bank = bank
        self._step = step
        self._size = size
        self._device = model.device
        self._is_fixed = self._device.type == "cuda"
        self._state = _State(size, self._device)
        self._filler_slot = size.num_slots
        self._num_seats = bank.num_seats + 1
        self._replays: dict[tuple[str, int, bool], Replay] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._is_fixed else None
        head: Any = model.get_output_embeddings()
        self._head_VD: Tensor = head.weight
        self._head_bias: Tensor | None = getattr(head, "bias", None)
        self._row_sizes = [size.num_slots]
        while self._row_sizes[-1] >= 2 * FEWEST_ROWS:
            self._row_sizes.append((self._row_sizes[-1] + 1) // 2)
        self._token_sizes = [
            size.tokens_per_prefill // part
            for part in PARTS_OF_PROMPTS
            if part == 1 or size.tokens_per_prefill // part >= size.longest_prompt
        ]

    # Prompts ------------------------------------------------------------------------------------

    def most_prompts(self) -> int:
        """How many prompts can begin at once, however short they are."""
        return self._most_rows(self._size.tokens_per_prefill)

    def _most_rows(self, num_tokens: int) -> int:
        return max(1, min(self._size.num_slots, num_tokens // SHORT_PROMPT))

    @torch.no_grad()
    def begin(self, prompts: Sequence[Prompt]) -> Tensor:
        """int64[B] on the device: the first token of each answer; the prompts fill their slots.

        Args:
            prompts: in ascending order of their seats; at most `most_prompts()`, of at most
                `tokens_per_prefill` tokens together. The result has at least as many numbers.
        """
        sampled = [one for one in prompts if one.sampling is not None]
        if sampled:
            self._put_keys(sampled)
        num_tokens = sum(len(one.ids) for one in prompts)
        size = None
        if self._is_fixed:
            fitting = [
                one
                for one in self._token_sizes
                if one >= num_tokens and self._most_rows(one) >= len(prompts)
            ]
            size = min(fitting)
        inputs, lengths = self._lay_prompts(prompts, size)

        def body(buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            token_B = self._begin(buffers, lengths, sampled=bool(sampled))
            return token_B, token_B

        if size is None:
            return body(self._sent(inputs))[1]
        key = ("prompts", size, bool(sampled))
        if key not in self._replays:
            self._capture(key, body, self._lay_prompts([], size)[0])
        return self._replays[key].forward(inputs)

    def _put_keys(self, prompts: Sequence[Prompt]) -> None:
        key_BT = np.zeros((len(prompts), self._state.key_ST.shape[1]), dtype=np.int32)
        for row, one in zip(key_BT, prompts, strict=True):
            assert one.sampling is not None
            row[: one.max_new_tokens] = one.sampling.keys(one.max_new_tokens)
        slot_B = torch.tensor([one.slot for one in prompts])
        self._state.key_ST[sent(slot_B, self._device)] = sent(
            torch.from_numpy(key_BT), self._device
        )

    def _lay_prompts(
        self, prompts: Sequence[Prompt], size: int | None
    ) -> tuple[list[Tensor], list[int]]:
        """Tokens and positions; all else that is whole; what is not. And how to split the second:
        the routing's lengths, then bounds, slots of tokens, last tokens and slots of rows."""
        lengths = np.array([len(one.ids) for one in prompts], dtype=np.int64)
        seats = np.array([one.seat for one in prompts], dtype=np.int64)
        rows = _end_to_end([one.ids for one in prompts])
        laid, routing, routing_lengths = self._lay(rows, seats, size)
        num_rows = len(prompts) if size is None else self._most_rows(size)
        slots = np.full(num_rows, self._filler_slot, dtype=np.int32)
        slots[: len(prompts)] = [one.slot for one in prompts]
        token_slots = np.full(len(laid.input_ids), self._filler_slot, dtype=np.int32)
        token_slots[: int(lengths.sum())] = np.repeat(slots[: len(prompts)], lengths)
        last = np.zeros(num_rows, dtype=np.int32)
        last[: len(prompts)] = rows.offsets[1:] - 1
        how = np.zeros((2, num_rows), dtype=np.float32)
        how[1] = 1
        for index, one in enumerate(prompts):
            if one.sampling is not None:
                how[:, index] = one.sampling.temperature, one.sampling.top_p
        parts = [routing, laid.row_bounds, token_slots, last, slots]
        inputs = [
            torch.from_numpy(np.stack([laid.input_ids, laid.position_ids])),
            torch.from_numpy(np.concatenate(parts)),
            torch.from_numpy(how),
        ]
        return inputs, [*routing_lengths, *(len(one) for one in parts[1:])]

    def _begin(self, inputs: Sequence[Tensor], lengths: list[int], *, sampled: bool) -> Tensor:
        tokens, whole, how = inputs
        parts = _split(whole, lengths)
        bounds, token_slot_M, last_B, slot_B = parts[-4:]
        self._step.routing = list(parts[:-4])
        slots = slot_B.long()
        state = self._state
        state.temperature_S[slots] = how[0]
        state.top_p_S[slots] = how[1]
        state.count_S.index_fill_(0, slots, 0)
        hidden_MD = self._body(
            tokens[0],
            tokens[1],
            slot_M=token_slot_M.long(),
            position_M=tokens[1],
            **where_rows_lie(
                bounds, num_tokens=tokens.shape[1], longest_row=self._size.longest_prompt
            ),
        )
        last = last_B.long()
        return self._choose(hidden_MD[last], slots, tokens[1][last] + 1, sampled=sampled)

    # Steps --------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, slots: NDArray[np.int32], counts: Sequence[int], *, sampled: bool) -> Tensor:
        """int64[B] on the device: one more token of each row.

        Args:
            slots: of the rows, in ascending order of their seats.
            counts: rows of each seat, the plain one included.
            sampled: whether any of the rows samples.
        """
        size = None
        if self._is_fixed:
            size = min(one for one in self._row_sizes if one >= len(slots))
        inputs, lengths = self._lay_step(slots, counts, size)

        def body(buffers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            hidden_BD, slot_B, position_B = self._step_body(buffers, lengths)
            token_B = self._choose(hidden_BD, slot_B, position_B + 1, sampled=sampled)
            return token_B, token_B

        if size is None:
            return body(self._sent(inputs))[1]
        key = ("step", size, sampled)
        if key not in self._replays:
            nobody = self._lay_step(np.zeros(0, dtype=np.int32), [0] * self._num_seats, size)
            self._capture(key, body, nobody[0])
        return self._replays[key].forward(inputs)

    def _lay_step(
        self, slots: NDArray[np.int32], counts: Sequence[int], size: int | None
    ) -> tuple[list[Tensor], list[int]]:
        num_rows = len(slots) if size is None else size
        routing, lengths = route(
            counts,
            fresh=[False] * len(counts),
            num_tokens=num_rows,
            fixed_size=size is not None,
        )
        filler = np.full(num_rows - len(slots), self._filler_slot, dtype=np.int32)
        whole = np.concatenate([routing, slots, filler])
        return [torch.from_numpy(whole)], [*lengths, num_rows]

    def _step_body(
        self, inputs: Sequence[Tensor], lengths: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states, slots and positions of the rows."""
        parts = _split(inputs[0], lengths)
        self._step.routing = list(parts[:-1])
        slot_B = parts[-1].long()
        position_B = self._state.length_S[slot_B]
        hidden_BD = self._body(
            self._state.token_S[slot_B],
            position_B,
            slot_M=slot_B,
            position_M=position_B,
            is_prompt=False,
        )
        return hidden_BD, slot_B, position_B

    def _choose(
        self, hidden_BD: Tensor, slot_B: Tensor, length_B: Tensor, *, sampled: bool
    ) -> Tensor:
        """The next tokens, or NOT_FINITE; the slots' state is then that of the next step."""
        state = self._state
        logits_BV = self._logits(hidden_BD)
        count_B = state.count_S[slot_B]
        if sampled:
            at_B = count_B.clamp(max=state.key_ST.shape[1] - 1)
            token_B = drawn(
                logits_BV,
                temperature_M=state.temperature_S[slot_B],
                top_p_M=state.top_p_S[slot_B],
                key_M=state.key_ST[slot_B, at_B],
            )
        else:
            token_B = likeliest(logits_BV)
        state.token_S[slot_B] = token_B
        state.length_S[slot_B] = length_B
        state.count_S[slot_B] = count_B + 1
        # Filler begins anew at each step, so that it never grows.
        state.length_S[-1:].zero_()
        state.count_S[-1:].zero_()
        return or_not_finite(token_B, logits_BV)

    # Scores -------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, rows: EncodedRows, seats: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """float32[L] log-likelihoods in nats of the target tokens in order; bool[L], whether each
        is the likeliest.

        Args:
            rows: in ascending order of their seats; a row's first token is never a target.
            seats: of the rows.
        """
        laid, routing, lengths = self._lay(rows, seats, None)
        parts = [routing, laid.row_bounds]
        whole = torch.from_numpy(np.concatenate(parts))
        index, labels, tokens, whole = self._sent(
            [
                torch.from_numpy(laid.index),
                torch.from_numpy(laid.labels),
                torch.from_numpy(np.stack([laid.input_ids, laid.position_ids])),
                whole,
            ]
        )
        split = _split(whole, [*lengths, len(laid.row_bounds)])
        self._step.routing = list(split[:-1])
        longest = int(rows.lengths.max())
        where = where_rows_lie(split[-1], num_tokens=tokens.shape[1], longest_row=longest)
        hidden_MD = self._body(tokens[0], tokens[1], **where)
        values = [torch.zeros(0, device=self._device)]
        greedy = [torch.zeros(0, dtype=torch.bool, device=self._device)]
        at_once = logit_rows(len(self._head_VD))
        for begin in range(0, len(index), at_once):
            logits_LV = self._logits(hidden_MD[index[begin : begin + at_once]])
            label_L = labels[begin : begin + at_once]
            scores_LV = logits_LV.float().log_softmax(dim=-1)
            values.append(scores_LV.gather(1, label_L[:, None])[:, 0])
            greedy.append(likeliest(logits_LV) == label_L)
        return torch.cat(values), torch.cat(greedy)

    # What they share ----------------------------------------------------------------------------

    def _lay(
        self, rows: EncodedRows, seats: NDArray[np.int64], size: int | None
    ) -> tuple[LaidOut, NDArray[np.int32], list[int]]:
        """Rows end to end as arrays, and their routing."""
        longest = self._size.longest_prompt
        num_rows = None
        if size is not None:
            num_rows = self._most_rows(size) + most_filler_rows(
                num_tokens=size, longest_row=longest
            )
        laid = lay_out_step(
            StepRows(
                rows=rows,
                slots=seats,
                weights=np.zeros(len(rows)),
                keys=np.zeros(len(rows), dtype=np.int64),
                fresh=frozenset(),
            ),
            num_slots=self._num_seats,
            longest_row=longest,
            num_tokens=size,
            num_rows=num_rows,
        )
        routing, lengths = route(
            laid.counts,
            fresh=[False] * self._num_seats,
            num_tokens=len(laid.input_ids),
            fixed_size=size is not None,
        )
        return laid, routing, lengths

    def _body(self, ids_M: Tensor, position_M_: Tensor, **where: Any) -> Tensor:
        """Last hidden states, M x D."""
        embedded = self._model.get_input_embeddings()(ids_M[None])
        output: Any = self._model.base_model(
            inputs_embeds=embedded, position_ids=position_M_[None], use_cache=False, **where
        )
        return output.last_hidden_state[0]

    def _logits(self, hidden_MD: Tensor) -> Tensor:
        return functional.linear(hidden_MD, self._head_VD, self._head_bias)

    def _sent(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [sent(one, self._device) for one in inputs]

    def _capture(self, key: tuple[str, int, bool], body: Any, example: Sequence[Tensor]) -> None:
        self._replays[key] = Replay(
            body, example, backward=False, device=self._device, pool=self._pool
        )

    @torch.no_grad()
    def check(self, expected: Sequence[tuple[list[int], Tensor]]) -> None:
        """Hold prompts and steps of rows against the base's own logits at every token of them.

        Raises:
            ModelError: they differ by more than rounding.
        """
        seats, slots = (0, self._bank.plain_seat), (0, self._filler_slot)
        ids = [np.array(row, dtype=np.int32) for row, _ in expected]
        prompts = [
            Prompt(row[:-CHECK_STEPS], seat, slot, None, 1)
            for row, seat, slot in zip(ids, seats, slots, strict=True)
        ]
        inputs, lengths = self._lay_prompts(prompts, None)
        hidden = list[Tensor]()
        tokens, whole, _ = self._sent(inputs)
        parts = _split(whole, lengths)
        self._step.routing = list(parts[:-4])
        bounds, token_slot_M, last_B, _ = parts[-4:]
        where = where_rows_lie(
            bounds, num_tokens=tokens.shape[1], longest_row=self._size.longest_prompt
        )
        hidden_MD = self._body(
            tokens[0], tokens[1], slot_M=token_slot_M.long(), position_M=tokens[1], **where
        )
        hidden.append(hidden_MD[last_B.long()])
        counts = np.bincount(seats, minlength=self._num_seats).tolist()
        inputs, lengths = self._lay_step(np.array(slots, dtype=np.int32), counts, None)
        for back in range(-CHECK_STEPS, 0):
            for slot, row in zip(slots, ids, strict=True):
                self._state.token_S[slot] = int(row[back])
                self._state.length_S[slot] = len(row) + back
            hidden.append(self._step_body(self._sent(inputs), lengths)[0])
        self._state.length_S.zero_()
        found = self._logits(torch.stack(hidden, dim=1)).float()
        wanted = torch.stack([logits_TV[-CHECK_STEPS - 1 :] for _, logits_TV in expected])
        error = furthest(found, wanted)
        if not error <= LOGITS_TOLERANCE[self._model.dtype]:
            raise ModelError(
                f"{type(self._model).__name__} computes something that many adapters at once do "
                f"not: its logits differ by {error:.1e} of their largest; evaluate one adapter "
                "after another"
            )


def _split(whole: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", whole.split(list(lengths)))  # torch leaves it untyped


def _end_to_end(ids: Sequence[NDArray[np.int32]]) -> EncodedRows:
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in ids], out=offsets[1:])
    whole = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
    return EncodedRows(whole, offsets, np.zeros(len(whole), dtype=np.bool_))


@contextmanager
def installed_decoder(
    model: PreTrainedModel, bank: AdapterBank, size: DecoderSize
) -> Generator[DecodingModel]:
    """The decoding model, for as long as the block runs; afterwards the base is as it was.

    Args:
        model: a frozen base without adapters, whose layers `bank` was made for.
        bank: nobody has taken a seat yet.
        size: what is allocated; at least as much as the check needs.

    Raises:
        ModelError: the family computes something that the packed form does not.
    """
    resident = Resident(model)
    expected = check_rows(model)
    step = StepRouting()
    try:
        model.eval()
        model.config._attn_implementation = NAME  # pyright: ignore[reportPrivateUsage]  # its setter
        layers = attention_layers(model)
        _replace_linears(model, bank, step)
        if model.device.type == "cuda":
            # The weights that were laid side by side leave as much behind: 8 GiB of a 7B model.
            release_memory(model.device)
        caches = [
            shape.allocate(
                num_slots=size.num_slots + 1,
                room=size.room,
                dtype=model.dtype,
                device=model.device,
            )
            for shape in layers
        ]
        cache_on(layers, caches)
        decoder = DecodingModel(model, bank, step, size)
        decoder.check(expected)
        yield decoder
    finally:
        resident.restore()


@torch.no_grad()
def attention_layers(model: PreTrainedModel) -> list[CacheShape]:
    """Every attention layer in the order in which it is called; decoding attention is set.

    Raises:
        ModelError: the family's attention does not go through transformers' interface.
    """
    noted = list[CacheShape]()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    bounds = torch.tensor([0, 2], dtype=torch.int32, device=model.device)
    model.base_model(
        inputs_embeds=model.get_input_embeddings()(ids),
        position_ids=torch.arange(2, device=model.device)[None],
        use_cache=False,
        noted=noted,
        **where_rows_lie(bounds, num_tokens=2, longest_row=2),
    )
    if not noted:
        raise ModelError(
            f"the attention of {type(model).__name__} does not go through transformers' interface; "
            "evaluate one adapter after another"
        )
    return noted


def _replace_linears(model: PreTrainedModel, bank: AdapterBank, step: StepRouting) -> None:
    linears = block_linears(model)
    for index, shape in enumerate(bank.layout.groups):
        members = [linears[name] for name in shape.names]
        down_AKD, up_ARE = bank.factors(index)
        group = DecodingGroup(
            weight_ED=side_by_side(members),
            bias_E=torch.cat([one.bias.detach() for one in members])
            if has_bias(members[0])
            else None,
            segments=shape.segments,
            down_AKD=down_AKD,
            up_ARE=up_ARE,
            gain_AE=bank.gain(index),
            step=step,
        )
        for member, name in enumerate(shape.names):
            parent, _, own = name.rpartition(".")
            packed = PackedLinear(members[member], group, member=member, num_members=len(members))
            setattr(model.get_submodule(parent), own, packed)


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that one token takes in the caches of all layers; the model is left as it was."""
    resident = Resident(model)
    try:
        model.config._attn_implementation = NAME  # pyright: ignore[reportPrivateUsage]  # its setter
        layers = attention_layers(model)
    finally:
        resident.restore()
    return sum(one.bytes_per_token(model.dtype.itemsize) for one in layers)

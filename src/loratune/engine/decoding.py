"""Many adapters answer at once over one resident base.

Rows of many adapters share every step: a row has a slot with its keys and values for as long as it
is answered, and the next request takes its place as soon as it has ended. Requests are taken in
the order of their adapters, so that few adapters are in a step and each has many rows there.

What it promises: the tokens of an answer are those of transformers' `generate` with that adapter
alone, but for rounding (tests hold that in float32 they are equal); they depend on the request and
its adapter alone, not on neighbours, order or the number of slots; a row that samples draws from
its own seed. Rounding changes a token only where two are as near as that, sampled or not: in 16
bits neighbours move the last bits of the logits, as in any batched generation, and two tokens that
are almost equally likely may change places.

What it does not: beam search, penalties, adapters that are no LoRA, several devices. A model whose
family computes otherwise than the packed form is refused (`engine.decoding_model`).

The device never waits for the host. The next token and all that a step needs stay on the device;
the host reads a step's tokens while the next one runs, so that an answer that has ended is known
one step late, and what was made of it in between is thrown away. That a row reaches its limit is
known beforehand. On a CPU tokens are read at once.

Bytes and time of a step (bfloat16; h hidden, l layers, B rows of c tokens each, W bytes of weights;
H100: 3.0e12 bytes and at most 780e12 FLOPs a second, both measured):

    weights         W                            135M shape: 0.27 GB     7B shape: 13.2 GB
    keys, values    B c 2 l (key heads) 2 D      2048 x 228: 10.8 GB     200 x 228: 23.9 GB
    adapters        of the rows in the step      rank 16: 9.8 MB each    80 MB each
    activations     about 60 B h 2 l, unfused    2048 rows: 4.2 GB       200 rows: 3.1 GB
    logits          3 B V 2                      2048 rows: 0.6 GB       200 rows: 0.04 GB
    sum over 3.0e12 bytes/s                      5.3 ms, 390k tokens/s   13.4 ms, 15k tokens/s
    launches        about 50 l, 2 to 3 us each   3 to 4.5 ms             3.2 to 4.8 ms

The first five are bounds, the last is an estimate from launches in captured graphs; together about
9 ms (230k tokens/s) and 17 ms (12k tokens/s). With 64 rows instead of 2048 the launches alone would
take nearly all of the time: many rows a step are what makes small models fast.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.rows import lay_end_to_end
from loratune.engine.decoding_adapters import (
    Adapter,
    AdapterBank,
    SeatRow,
    needs_of,
    seat_bytes,
)
from loratune.engine.decoding_choice import NOT_FINITE, Sampling
from loratune.engine.decoding_model import (
    CHECK_TOKENS,
    DecoderSize,
    DecodingModel,
    Prompt,
    cache_bytes_per_token,
    installed_decoder,
)
from loratune.engine.decoding_text import (
    ENDS,
    MAY_STOP,
    Ends,
    answer_of,
    end_ids_of,
)
from loratune.engine.memory import out_of_memory_reason, release_memory
from loratune.errors import CapacityError, EvaluationError
from loratune.models.load import Base, positions_of
from loratune.records import NO_ANSWER, Answer

# Unless the caller says: rows at once, where memory allows; adapters at once; tokens of prompts.
MOST_SLOTS_ON_CUDA = 2048
SLOTS_ON_CPU = 32
MOST_SEATS = 64
PREFILL_TOKENS = 8192
# The share of free memory that slots may take; the rest is for what a step makes on the way.
SHARE_FOR_SLOTS = 0.8
SHARE_FOR_SEATS = 0.15
# Prompts wait until so small a part of all slots is free, or each would have a pass of its own.
PART_TO_REFILL = 32
# Adapters that are read before a seat is free for them.
READ_AHEAD = 2
# Keys of a slot begin at a multiple of so many tokens.
ROOM_STEP = 16


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt for one adapter.

    `adapter` is a key of the decoder's adapters. `stop` are texts that end an answer where the
    first of them appears, `end_ids` tokens that do, beside the tokenizer's and the model's EOS.
    Without `sampling` the likeliest tokens are taken.
    """

    adapter: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to request number `index`, and the tokens that it was read from."""

    index: int
    answer: Answer
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ContinuationRequest:
    """How likely an adapter finds `continuation_ids` after `context_ids`."""

    adapter: str
    context_ids: Sequence[int]
    continuation_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """`value`: the sum of the tokens' log-likelihoods in nats.

    `is_greedy`: each of them is the likeliest at its place.
    """

    value: float
    num_tokens: int
    is_greedy: bool


class Decoder:
    """Answers requests for any of its adapters.

    The base is in use while `answers` is being read and is as it was when that ends or is closed.
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, Adapter],
        *,
        num_slots: int | None = None,
        num_seats: int | None = None,
        tokens_per_prefill: int | None = None,
        steps_behind: int | None = None,
    ) -> None:
        """Read every adapter once.

        Args:
            base: a frozen base without an adapter.
            adapters: by key: in memory, folders in PEFT's format, or None for the plain base.
            num_slots: rows at once; fewer, where memory does not hold them. None: by the device.
            num_seats: adapters at once; None: up to 64, by the device.
            tokens_per_prefill: tokens of prompts that go through the model at once; for speed and
                memory alone.
            steps_behind: how many steps late the host reads; None: 1 on CUDA, else 0.

        Raises:
            ModelError: an adapter is missing, damaged, of another kind or of another base.
        """
        self._base = base
        self._adapters = dict(adapters)
        real = {key: one for key, one in self._adapters.items() if one is not None}
        self._needs = needs_of(base.model, tuple(real.values()))
        keys = tuple(real)
        self._not_finite = {keys[place] for place in self._needs.not_finite}
        self._num_slots = num_slots
        self._num_seats = num_seats or self._seats_that_fit(len(real))
        self._tokens_per_prefill = tokens_per_prefill or PREFILL_TOKENS
        is_cuda = base.device.type == "cuda"
        self._steps_behind = int(is_cuda) if steps_behind is None else steps_behind

    @property
    def num_slots(self) -> int | None:
        """Rows at once as it stands: None until it is known, fewer after a lack of memory."""
        return self._num_slots

    def answers(self, requests: Iterable[Request]) -> Generator[Answered]:
        """Each request's answer as soon as it has ended; out of memory, it goes on in fewer slots.

        An adapter with a NaN or infinite weight gives `NO_ANSWER`, as one does whose logits are not
        finite.

        Raises:
            EvaluationError: an unknown adapter, no room for a prompt and its answer, a prompt
                without a token, or max_new_tokens below 1; nothing has run then.
            CapacityError: not even one row of one adapter fits in memory.
            ModelError: the family is not one that many adapters can share.
        """
        asked = list(requests)
        for index, one in enumerate(asked):
            self._check(index, one.adapter, one.prompt_ids, one.max_new_tokens)
        left = dict(enumerate(asked))
        for index, one in enumerate(asked):
            if one.adapter in self._not_finite:
                del left[index]
                yield Answered(index, NO_ANSWER, ())
        while left:
            reason = None
            try:
                # Whatever has been answered stays so: rows that were cut off begin anew.
                for answered in self._answers(left):
                    del left[answered.index]
                    yield answered
            except RuntimeError as error:
                reason = out_of_memory_reason(error)
                if reason is None:
                    raise
            if reason is not None:
                # Outside the except block: the error holds on to what was allocated.
                release_memory(self._base.device)
                self._shrink(reason)

    def _answers(self, left: Mapping[int, Request]) -> Generator[Answered]:
        base = self._base
        bank = AdapterBank(base.model, self._needs, num_seats=self._num_seats)
        size = self._size_for(list(left.values()))
        num_left = Counter(one.adapter for one in left.values())
        with (
            installed_decoder(base.model, bank, size) as model,
            ThreadPoolExecutor(1) as reader,
        ):
            run = _Run(
                base,
                model,
                size,
                left,
                seating=_Seating(self._adapters, bank, num_left, reader=reader),
                num_seats=bank.num_seats + 1,
                steps_behind=self._steps_behind,
            )
            yield from run.answers()

    def _size_for(self, requests: Sequence[Request]) -> DecoderSize:
        longest = max(len(one.prompt_ids) for one in requests)
        # The last token of an answer is never attended to.
        room = max(len(one.prompt_ids) + one.max_new_tokens - 1 for one in requests)
        room = -(-max(room, CHECK_TOKENS) // ROOM_STEP) * ROOM_STEP
        if self._num_slots is None:
            self._num_slots = self._slots_that_fit(room)
        sampled = [one.max_new_tokens for one in requests if one.sampling is not None]
        return DecoderSize(
            num_slots=min(self._num_slots, len(requests)),
            room=room,
            longest_prompt=max(longest, CHECK_TOKENS),
            tokens_per_prefill=max(self._tokens_per_prefill, longest, CHECK_TOKENS),
            num_keys=max(sampled, default=0),
        )

    def _seats_that_fit(self, num_adapters: int) -> int:
        most = max(1, min(MOST_SEATS, num_adapters))
        device = self._base.device
        if device.type != "cuda":
            return most
        release_memory(device)
        free, _ = torch.cuda.mem_get_info(device)
        of_a_seat = seat_bytes(self._base.model, self._needs)
        return max(1, min(most, int(SHARE_FOR_SEATS * free / max(1, of_a_seat))))

    def _slots_that_fit(self, room: int) -> int:
        device = self._base.device
        if device.type != "cuda":
            return SLOTS_ON_CPU
        release_memory(device)
        free, _ = torch.cuda.mem_get_info(device)
        # One slot more is filler's.
        of_a_slot = room * cache_bytes_per_token(self._base.model)
        fitting = int(SHARE_FOR_SLOTS * free / of_a_slot) - 1
        return max(1, min(MOST_SLOTS_ON_CUDA, fitting))

    def _shrink(self, reason: str) -> None:
        """Half as many slots, and less of everything else that may have been too much."""
        if self._num_slots is not None and self._num_slots > 1:
            self._num_slots //= 2
        elif self._num_seats > 1:
            self._num_seats //= 2
        else:
            raise CapacityError(
                f"not even one row of one adapter fits in memory ({reason}); give shorter prompts "
                "or a smaller max_new_tokens, or load the base in 16 bits"
            )
        self._tokens_per_prefill = max(1, self._tokens_per_prefill // 2)

    def log_likelihoods(
        self, asked: Sequence[ContinuationRequest]
    ) -> Generator[tuple[int, ContinuationScore]]:
        """The log-likelihood of every continuation, with its index, batch by batch.

        Rows end to end, without a cache; log-softmax in float32. NaN where the adapter has a NaN or
        infinite weight.

        Raises:
            EvaluationError: an unknown adapter, a context or a continuation without a token, or
                both together longer than the model's positions.
            CapacityError: not even one row fits in memory.
            ModelError: the family is not one that many adapters can share.
        """
        for index, one in enumerate(asked):
            self._check(index, one.adapter, one.context_ids, len(one.continuation_ids))
        left = set(range(len(asked)))
        for index, one in enumerate(asked):
            if one.adapter in self._not_finite:
                left.remove(index)
                num_tokens = len(one.continuation_ids)
                yield index, ContinuationScore(math.nan, num_tokens, is_greedy=False)
        while left:
            reason = None
            try:
                # Whatever has been read stays so.
                for index, score in self._score(asked, sorted(left)):
                    left.remove(index)
                    yield index, score
            except RuntimeError as error:
                reason = out_of_memory_reason(error)
                if reason is None:
                    raise
            if reason is None:
                continue
            release_memory(self._base.device)
            if self._tokens_per_prefill == 1:
                raise CapacityError(f"not even one row fits in memory ({reason})")
            self._tokens_per_prefill //= 2

    def _score(
        self, asked: Sequence[ContinuationRequest], left: Sequence[int]
    ) -> Generator[tuple[int, ContinuationScore]]:
        """Those at the indices in `left`."""
        base = self._base
        lengths = [len(one.context_ids) + len(one.continuation_ids) for one in asked]
        order = _by_adapter(left, [asked[index].adapter for index in left])
        bank = AdapterBank(base.model, self._needs, num_seats=self._num_seats)
        num_left = Counter(asked[index].adapter for index in order)
        size = DecoderSize(
            num_slots=1,
            room=CHECK_TOKENS,
            longest_prompt=max(CHECK_TOKENS, *lengths),
            tokens_per_prefill=CHECK_TOKENS,
        )
        with (
            installed_decoder(base.model, bank, size) as model,
            ThreadPoolExecutor(1) as reader,
        ):
            seating = _Seating(self._adapters, bank, num_left, reader=reader)
            waiting = deque(order)
            while waiting:
                batch = dict[int, int]()
                tokens = 0
                while waiting:
                    index = waiting[0]
                    seat = seating.seat_of(asked[index].adapter)
                    tokens += lengths[index]
                    if seat is None or (batch and tokens > self._tokens_per_prefill):
                        break
                    batch[waiting.popleft()] = seat
                ordered = sorted(batch, key=lambda index: batch[index])
                seats = np.array([batch[index] for index in ordered], dtype=np.int64)
                rows = [asked[index] for index in ordered]
                value_L, greedy_L = model.score(
                    lay_end_to_end(
                        [[*one.context_ids, *one.continuation_ids] for one in rows],
                        [
                            [False] * len(one.context_ids) + [True] * len(one.continuation_ids)
                            for one in rows
                        ],
                    ),
                    seats,
                )
                counts = [len(one.continuation_ids) for one in rows]
                values = value_L.double().cpu().split(counts)
                greedy = greedy_L.cpu().split(counts)
                for index, count, value, likeliest in zip(
                    ordered, counts, values, greedy, strict=True
                ):
                    seating.done(asked[index].adapter)
                    yield index, ContinuationScore(float(value.sum()), count, bool(likeliest.all()))

    def _check(self, index: int, adapter: str, ids: Sequence[int], num_more: int) -> None:
        if adapter not in self._adapters:
            known = ", ".join(list(self._adapters)[:5])
            raise EvaluationError(
                f"request {index} asks adapter {adapter!r}, which is not among the "
                f"{len(self._adapters)} that the decoder was given ({known}); give it too"
            )
        if num_more < 1:
            raise EvaluationError(
                f"request {index} asks for {num_more} tokens (max_new_tokens, or the length of a "
                "continuation); give at least 1"
            )
        if not len(ids):
            raise EvaluationError(
                f"request {index} has a prompt without a token, and an answer has to start from "
                "one; give a prompt that is not empty"
            )
        positions = positions_of(self._base.model.config)
        if positions is not None and len(ids) + num_more > positions:
            raise EvaluationError(
                f"request {index} has a prompt of {len(ids)} tokens, and with {num_more} more it "
                f"exceeds the model's {positions} positions; shorten the prompt, or ask for at "
                f"most {max(0, positions - len(ids))}"
            )


class _Seating:
    """Which adapter sits where. One leaves when all its requests are done and another needs it.

    The next ones are read by a thread beside, in the order in which they will come.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        bank: AdapterBank,
        num_left: Counter[str],
        *,
        reader: Executor,
    ) -> None:
        """`num_left` are the requests of each adapter, in the order in which they first come."""
        self._adapters = adapters
        self._bank = bank
        self._num_left = num_left
        self._free = list(range(bank.num_seats))[::-1]
        self._seats = dict[str, int]()
        self._reader = reader
        self._unread = deque(key for key in num_left if adapters[key] is not None)
        self._being_read = dict[str, Future[SeatRow]]()
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self._unread and len(self._being_read) < READ_AHEAD:
            key = self._unread.popleft()
            adapter = self._adapters[key]
            assert adapter is not None
            self._being_read[key] = self._reader.submit(self._bank.read, adapter)

    def seat_of(self, adapter: str) -> int | None:
        """The adapter's seat, which it takes if one is free; None: it has to wait.

        Adapters are asked for in the order in which they were given.
        """
        if adapter in self._seats:
            return self._seats[adapter]
        if self._adapters[adapter] is None:
            return self._bank.plain_seat
        if not self._free:
            return None
        seat = self._free.pop()
        self._bank.put(seat, self._being_read.pop(adapter).result())
        self._read_ahead()
        self._seats[adapter] = seat
        return seat

    def done(self, adapter: str) -> None:
        """One request of the adapter less."""
        self._num_left[adapter] -= 1
        if self._num_left[adapter] == 0 and adapter in self._seats:
            self._free.append(self._seats.pop(adapter))


def _by_adapter(indices: Sequence[int], adapters: Sequence[str]) -> list[int]:
    """The indices with those of one adapter side by side, adapters as they first come."""
    groups = dict[str, list[int]]()
    for index, adapter in zip(indices, adapters, strict=True):
        groups.setdefault(adapter, []).append(index)
    return [index for group in groups.values() for index in group]


@dataclass(slots=True, eq=False)
class _Row:
    """A request in its slot. Tokens may still come when it is over; nobody looks at them then."""

    index: int
    request: Request
    ends: Ends
    seat: int
    slot: int
    last_step: int
    tokens: list[int] = field(default_factory=list[int])
    is_over: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """The rows of a launch in the order of their seats, and where those of each `Ends` are."""

    rows: tuple[_Row, ...]
    slots: NDArray[np.int32]
    counts: list[int]
    by_ends: tuple[tuple[Ends, NDArray[np.int64]], ...]
    sampled: bool

    @classmethod
    def of(cls, rows: Sequence[_Row], *, num_seats: int) -> "_Order":
        """The order of rows that are sorted by their seats."""
        places = dict[Ends, list[int]]()
        for place, row in enumerate(rows):
            places.setdefault(row.ends, []).append(place)
        seats = np.array([row.seat for row in rows], dtype=np.int64)
        return cls(
            rows=tuple(rows),
            slots=np.array([row.slot for row in rows], dtype=np.int32),
            counts=np.bincount(seats, minlength=num_seats).tolist(),
            by_ends=tuple((ends, np.array(where)) for ends, where in places.items()),
            sampled=any(row.request.sampling is not None for row in rows),
        )


class _Launch:
    """Tokens under way from the device: one for each row of `order`.

    `limited` are the rows that reach their limit with it.
    """

    def __init__(self, order: _Order, token_B: Tensor, limited: Sequence[_Row]) -> None:
        self.order = order
        self.limited = limited
        chosen = token_B[: len(order.rows)]
        self._event: torch.cuda.Event | None = None
        if chosen.is_cuda:
            self._tokens = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._tokens.copy_(chosen, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tokens = chosen

    def tokens(self) -> NDArray[np.int64]:
        """The tokens, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.numpy()


class _Run:
    """Requests on one installed model, from the first prompt to the last answer."""

    def __init__(
        self,
        base: Base,
        model: DecodingModel,
        size: DecoderSize,
        left: Mapping[int, Request],
        *,
        seating: _Seating,
        num_seats: int,
        steps_behind: int,
    ) -> None:
        self._base = base
        self._model = model
        self._size = size
        self._left = dict(left)
        self._seating = seating
        self._num_seats = num_seats
        self._steps_behind = steps_behind
        order = _by_adapter(list(left), [one.adapter for one in left.values()])
        self._waiting = deque(order)
        self._free = list(range(size.num_slots))[::-1]
        self._ends = dict[tuple[tuple[str, ...], tuple[int, ...]], Ends]()
        # Rows by seat and slot; the order of a step is made anew when they have changed.
        self._active = dict[int, dict[int, _Row]]()
        self._order: _Order | None = None
        self._num_steps = 0
        self._last_of_step = dict[int, list[_Row]]()
        self._under_way = deque[_Launch]()

    def answers(self) -> Generator[Answered]:
        """Every answer as soon as it is known."""
        while self._waiting or self._active or self._under_way:
            has_begun = self._begin()
            has_stepped = self._step()
            behind = self._steps_behind if has_begun or has_stepped else 0
            while len(self._under_way) > behind:
                yield from self._read(self._under_way.popleft())

    def _begin(self) -> bool:
        """Launch the prompts of requests for which there are slots, if it is worth a pass."""
        has_begun = False
        enough = max(1, self._size.num_slots // PART_TO_REFILL)
        while self._waiting and len(self._free) >= min(enough, len(self._waiting)):
            rows = self._take()
            if not rows:
                break
            order = _Order.of(rows, num_seats=self._num_seats)
            token_B = self._model.begin(
                [
                    Prompt(
                        np.asarray(row.request.prompt_ids, dtype=np.int32),
                        row.seat,
                        row.slot,
                        row.request.sampling,
                        row.request.max_new_tokens,
                    )
                    for row in order.rows
                ]
            )
            limited = [row for row in rows if row.request.max_new_tokens == 1]
            self._under_way.append(_Launch(order, token_B, limited))
            for row in limited:
                self._leave(row)
            has_begun = True
        return has_begun

    def _take(self) -> list[_Row]:
        """The next requests in slots and seats, as many as one pass holds, sorted by seats."""
        rows = list[_Row]()
        num_tokens = 0
        while self._waiting and self._free and len(rows) < self._model.most_prompts():
            request = self._left[self._waiting[0]]
            num_tokens += len(request.prompt_ids)
            if rows and num_tokens > self._size.tokens_per_prefill:
                break
            seat = self._seating.seat_of(request.adapter)
            if seat is None:
                break
            row = _Row(
                index=self._waiting.popleft(),
                request=request,
                ends=self._ends_of(request),
                seat=seat,
                slot=self._free.pop(),
                last_step=self._num_steps + request.max_new_tokens - 1,
            )
            rows.append(row)
            self._active.setdefault(seat, {})[row.slot] = row
            self._last_of_step.setdefault(row.last_step, []).append(row)
            self._order = None
        return sorted(rows, key=lambda row: row.seat)

    def _ends_of(self, request: Request) -> Ends:
        key = (request.stop, request.end_ids)
        if key not in self._ends:
            head = self._base.model.get_output_embeddings()
            assert head is not None, "a causal model has an output head"
            self._ends[key] = Ends(
                self._base.tokenizer,
                stop=request.stop,
                end_ids=end_ids_of(self._base, request.end_ids),
                vocab_size=head.weight.shape[0],
            )
        return self._ends[key]

    def _step(self) -> bool:
        """Launch one more token of every row."""
        if not self._active:
            return False
        if self._order is None:
            rows = [row for seat in sorted(self._active) for row in self._active[seat].values()]
            self._order = _Order.of(rows, num_seats=self._num_seats)
        order = self._order
        token_B = self._model.step(order.slots, order.counts, sampled=order.sampled)
        self._num_steps += 1
        ending = self._last_of_step.pop(self._num_steps, [])
        limited = [row for row in ending if not row.is_over]
        self._under_way.append(_Launch(order, token_B, limited))
        for row in limited:
            self._leave(row)
        return True

    def _leave(self, row: _Row) -> None:
        """Make room: what is launched from here on is without the row."""
        rows = self._active.get(row.seat, {})
        if rows.get(row.slot) is not row:
            return
        del rows[row.slot]
        if not rows:
            del self._active[row.seat]
        self._free.append(row.slot)
        self._order = None

    def _read(self, launch: _Launch) -> Generator[Answered]:
        """Give each row its token, and end those that it ends."""
        tokens = launch.tokens()
        rows = launch.order.rows
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.tokens.append(token)
            if token == NOT_FINITE and not row.is_over:
                yield self._over(row, NO_ANSWER)
        for ends, places in launch.order.by_ends:
            # Where there is no token the row is over: any serves.
            kinds = ends.kinds(np.maximum(tokens[places], 0))
            for place in np.flatnonzero(kinds >= MAY_STOP).tolist():
                row = rows[places[place]]
                if not row.is_over and (kinds[place] == ENDS or ends.is_stopped(row.tokens)):
                    yield self._end(row, finished=True)
        for row in launch.limited:
            if not row.is_over:
                yield self._end(row, finished=False)

    def _end(self, row: _Row, *, finished: bool) -> Answered:
        answer = answer_of(
            self._base.tokenizer,
            row.tokens,
            stop=row.request.stop,
            end_ids=row.ends.end_ids,
            finished=finished,
        )
        return self._over(row, answer)

    def _over(self, row: _Row, answer: Answer) -> Answered:
        row.is_over = True
        self._leave(row)
        self._seating.done(row.request.adapter)
        return Answered(row.index, answer, tuple(row.tokens[: answer.num_tokens]))

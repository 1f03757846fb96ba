"""The packed engine: the trials of a study trained together over one resident base.

Each trial has a slot. A step lays rows of many trials end to end and runs the base once; each token
goes through its own trial's adapter. A trial updates when its own batch is complete; until then its
gradient waits. A slot that becomes free takes the next trial at once. Learning rates, scales, steps
and who sits in which slot are data: nothing is compiled anew for them.

What it promises, against the reference engine: the same rows in the same order, the same
initialisation, the exact token mean over the whole batch, the same updates; numbers that differ by
rounding alone (tests hold how much), whoever the neighbours are. Going on from snapshots of all its
trials is bit-equal to not having stopped, on one machine. Dropout is drawn per trial, row and
feature, so it does not depend on neighbours, but its masks are not the reference engine's.

What it does not: methods that are not `Packable`, and models whose attention itself has dropout.

On CUDA a step's results are read while the next one runs; on a CPU at once.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.order import row_order
from loratune.data.prepare import PreparedData
from loratune.data.rows import EncodedRows, concatenate
from loratune.engine.account import Account
from loratune.engine.attention import has_row_attention
from loratune.engine.base import Event, Failed, Feed, Finished, Progress, Snapshot, Work
from loratune.engine.divergence import DivergenceWatch
from loratune.engine.dora_gains import DoraGains
from loratune.engine.laying import StepRows, most_filler_rows
from loratune.engine.loss import num_targets
from loratune.engine.loss_scale import LossScale
from loratune.engine.memory import out_of_memory_reason, release_memory, sent
from loratune.engine.optimizer import RowUpdate, update_rows
from loratune.engine.packed_gradients import PackedGradients, ProbedSlot, probed_rows
from loratune.engine.packed_model import StepSize, group_targets, installed, lay_side_by_side
from loratune.engine.row_gradients import ProbeRows, probe_record, probes_apart
from loratune.engine.slots import (
    RowLayout,
    Slots,
    from_row,
    frozen_row,
    lay_out,
    re_lay,
    to_row,
)
from loratune.errors import LoratuneError, StudyError
from loratune.methods import load_method
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.base import AdamFactors, Method, Packable
from loratune.models.load import Base
from loratune.models.targets import block_linears, target_modules
from loratune.planning.bar import Bar
from loratune.planning.horizon import lr_factor
from loratune.planning.packing import Demand, PackShape, choose_next, fill_step
from loratune.planning.probes import Probing, probing
from loratune.records import FinishedStatus, NoiseProbe, NoiseSchedule, Outcome, Trial

# Steps that are not full run at a part of the size, if that holds them: each size compiles once.
PARTS_OF_A_STEP = (1, 4, 16)


class PackedEngine:
    """Trains the trials of one base model and one set of targets, as many at once as have a slot.

    `data` is keyed by data fingerprint. `shape` says what is allocated; it is made smaller when the
    device runs out of memory. `noise` says which rows' gradients are looked at one by one; the
    steps that hold any run eagerly. A step's results are read when `steps_ahead` later ones have
    been launched; left out it is 1 on CUDA, which has work meanwhile, and 0 elsewhere. In float16
    it is always 0: an overflow takes a batch back before the next one is trained on.
    """

    name = "packed"

    def __init__(
        self,
        base: Base,
        data: Mapping[str, PreparedData],
        *,
        shape: PackShape,
        targets: Sequence[str],
        noise: NoiseSchedule | None = None,
        find_method: Callable[[str], Method] = load_method,
        compile_blocks: bool | None = None,
        steps_ahead: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._base = base
        self._data = data
        self._shape = shape
        self._targets = tuple(targets)
        self._noise = noise
        self._find_method = find_method
        self._compile_blocks = (
            # Where attention pads its rows, every step has another size.
            has_row_attention(base.device) if compile_blocks is None else compile_blocks
        )
        if base.model.dtype == torch.float16:
            self._steps_ahead = 0
        elif steps_ahead is None:
            self._steps_ahead = 1 if base.device.type == "cuda" else 0
        else:
            self._steps_ahead = steps_ahead
        self._clock = clock

    @property
    def shape(self) -> PackShape:
        """What is allocated now."""
        return self._shape

    def train(self, feed: Feed) -> Generator[Event]:
        """See `engine.base.Engine`. Out of memory, all trials go on in a smaller pack."""
        parked: list[Work] = []
        while True:
            session = _Session(
                self._base,
                self._data,
                shape=self._shape,
                targets=self._targets,
                noise=self._noise,
                find_method=self._find_method,
                compile_blocks=self._compile_blocks,
                steps_ahead=self._steps_ahead,
                clock=self._clock,
                parked=parked,
            )
            try:
                yield from session.events(feed)
                return
            except _TooLarge as error:
                parked, reason, began = error.parked, error.reason, error.began
            del session
            release_memory(self._base.device)
            smaller = _shrunk(self._shape, longest=self._longest_row(), began=began)
            if smaller is not None:
                self._shape = smaller
                continue
            # Where not even the slots fit, no trial has been claimed yet.
            work = parked.pop(0) if parked else _claim_first(feed)
            if work is None:
                return
            outcome = Account().outcome(
                work.trial,
                "out_of_memory",
                peak_memory_bytes=None,
                rows_per_microbatch=1,
                reason=f"not even one row of one trial fits: {reason}",
            )
            yield Finished(outcome, None)

    def _longest_row(self) -> int:
        return _longest_row(self._data)


class _TooLarge(Exception):
    """The device ran out of memory; `parked` are the trials that were under way, rewound."""

    def __init__(self, parked: list[Work], reason: str, *, began: bool) -> None:
        super().__init__(reason)
        self.parked = parked
        self.reason = reason
        self.began = began


def _claim_first(feed: Feed) -> Work | None:
    while waiting := feed.waiting():
        work = feed.claim(waiting[0])
        if work is not None:
            return work
    return None


def _shrunk(shape: PackShape, *, longest: int, began: bool) -> PackShape | None:
    """A smaller pack: fewer tokens a step, then blocks that keep less, then fewer slots.

    A pack that could not even be allocated (not `began`) has too many slots.
    """
    if (began or shape.num_slots == 1) and shape.tokens_per_step > longest:
        return replace(shape, tokens_per_step=max(longest, shape.tokens_per_step // 2))
    if began and not shape.gradient_checkpointing:
        return replace(shape, gradient_checkpointing=True)
    if shape.num_slots > 1:
        return replace(shape, num_slots=shape.num_slots // 2)
    return None


def _longest_row(data: Mapping[str, PreparedData]) -> int:
    sets = [rows for one in data.values() for rows in (one.train, one.validation) if rows]
    return max(int(rows.lengths.max()) for rows in sets)


@dataclass(frozen=True, eq=False)
class _RowSizes:
    """Tokens, and tokens with loss, of every training row: int64[num_rows]."""

    lengths: NDArray[np.int64]
    targets: NDArray[np.int64]

    @classmethod
    def of(cls, rows: EncodedRows) -> "_RowSizes":
        """A row's first token has no loss, whatever its mask says."""
        counted = rows.is_target.copy()
        counted[rows.offsets[:-1]] = False
        before = np.concatenate([[0], np.cumsum(counted)])
        return cls(rows.lengths, before[rows.offsets[1:]] - before[rows.offsets[:-1]])


@dataclass(eq=False)
class _Seat:
    """A trial in a slot: where it is in its data, and what it has done.

    `update` is the batch under way, `rows_done` how many of its rows have been through the model,
    `attempt` grows when a batch is begun anew, so that results of the former try are told apart.
    `watched` are squared norms of the gradients of the rows done, where the batch is looked at row
    by row, and `probed_at` the update before which other rows last were.
    """

    slot: int
    trial: Trial
    data: PreparedData
    sizes: "_RowSizes"
    method: Packable
    factors: tuple[AdamFactors, AdamFactors, AdamFactors]
    frozen_P: Tensor | None
    watch: DivergenceWatch
    bar: Bar | None
    account: Account
    loss_scale: LossScale
    probing: Probing
    has_magnitudes: bool = False
    update: int = 0
    rows_done: int = 0
    attempt: int = 0
    batch: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    targets: int = 0
    watched: list[Tensor] = field(default_factory=list[Tensor])
    probed_at: int | None = None

    def begin_batch(self, update: int) -> None:
        """Make `update` the batch under way, none of it done."""
        trial = self.trial
        self.update, self.rows_done = update, 0
        self.watched = []
        if update == trial.num_updates:
            return
        is_last = update + 1 == trial.num_updates
        self.batch = row_order(
            trial.seed,
            num_rows=trial.num_train_rows,
            start=update * trial.batch_size,
            count=trial.last_batch_size if is_last else trial.batch_size,
        )
        self.lengths = self.sizes.lengths[self.batch]
        self.targets = int(self.sizes.targets[self.batch].sum())

    @property
    def is_through(self) -> bool:
        """All of its batches have been through the model."""
        return self.update == self.trial.num_updates

    @property
    def is_watched(self) -> bool:
        """The batch under way is looked at row by row, and has been from its first row."""
        is_probe = self.probing.of_batch(self.update, num_rows=len(self.batch))
        return is_probe and (self.rows_done == 0 or bool(self.watched))

    def as_probed(self) -> ProbedSlot:
        """The slot as its rows' gradients are looked at before the next update."""
        return ProbedSlot(self.slot, num_updates=self.update, beta2=self.trial.beta2)

    @property
    def is_complete(self) -> bool:
        """The results of all its batches are known; what is left is validation."""
        return len(self.account.losses) == self.trial.num_updates

    def row_update(self) -> RowUpdate:
        """The optimizer step of the batch under way."""
        trial = self.trial
        factor = lr_factor(
            trial.schedule,
            update=self.update,
            num_updates=trial.num_updates,
            warmup=trial.warmup_steps,
        )
        a, b, other = self.factors
        lr, eps, decay = trial.learning_rate * factor, trial.eps, trial.weight_decay
        return RowUpdate(
            slot=self.slot,
            step=self.update + 1,
            learning_rates=(lr * a.lr_factor, lr * b.lr_factor, lr * other.lr_factor),
            beta1=trial.beta1,
            beta2=trial.beta2,
            eps=(eps * a.eps_factor, eps * b.eps_factor, eps * other.eps_factor),
            weight_decays=(
                decay * a.weight_decay_factor,
                decay * b.weight_decay_factor,
                decay * other.weight_decay_factor,
            ),
            max_grad_norm=trial.max_grad_norm,
            loss_scale=self.loss_scale.value,
        )


@dataclass(frozen=True, eq=False)
class _Done:
    """One completed batch of a step whose results are not read yet."""

    seat: _Seat
    update: int
    attempt: int
    num_rows: int
    num_tokens: int
    targets: int


@dataclass(eq=False)
class _Launched:
    """A step on its way: float64[2, U] loss sums and gradient norms will be in `results`."""

    done: tuple[_Done, ...]
    results: Tensor | None
    event: torch.cuda.Event | None
    tokens: tuple[tuple[_Seat, int], ...]


class _Session:
    """One allocation of slots on one base, from its first step to its last."""

    def __init__(
        self,
        base: Base,
        data: Mapping[str, PreparedData],
        *,
        shape: PackShape,
        targets: Sequence[str],
        noise: NoiseSchedule | None,
        find_method: Callable[[str], Method],
        compile_blocks: bool,
        steps_ahead: int,
        clock: Callable[[], float],
        parked: Sequence[Work],
    ) -> None:
        self.base = base
        self.data = data
        self.shape = shape
        self.device = base.device
        self.noise = noise
        self.find_method = find_method
        self.compile_blocks = compile_blocks
        self.clock = clock
        self.parked = list(parked)
        self.targets = target_modules(base.model, targets)
        self.longest_row = _longest_row(data)
        self.seats: dict[int, _Seat] = {}
        self.launched: deque[_Launched] = deque()
        self.probes: deque[NoiseProbe] = deque()
        self.read_at = clock()
        self.steps_ahead = steps_ahead
        self.sizes = {name: _RowSizes.of(one.train) for name, one in data.items()}
        rows = sum(len(one.train) for one in data.values())
        tokens = sum(int(one.train.lengths.sum()) for one in data.values())
        self.mean_row_tokens = tokens / rows

    # The order of events ------------------------------------------------------------------------

    def events(self, feed: Feed) -> Generator[Event]:
        """See `engine.base.Engine.train`.

        Raises:
            _TooLarge: out of memory.
        """
        device, shape = self.device, self.shape
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = False
        try:
            # With dropout every layer drops features of its own.
            groups = group_targets(self.base.model, self.targets, apart=shape.dropout)
            # Each layer alone, as in a snapshot, which any later pack can take up.
            self.single = group_targets(self.base.model, self.targets, apart=True)
            lay_side_by_side(self.base.model, groups)
            layout = lay_out(groups, rank=shape.rank, magnitudes=shape.magnitudes)
            self.slots = Slots(
                layout,
                num_slots=shape.num_slots,
                dtype=self.base.model.dtype,
                device=device,
                corrected=shape.corrected,
            )
            self.loss_A = torch.zeros(shape.num_slots, dtype=torch.float64, device=device)
            self.keep_A = (
                torch.ones(shape.num_slots, dtype=torch.float32, device=device)
                if shape.dropout
                else None
            )
            linears = block_linears(self.base.model)
            with installed(
                self.base.model,
                self.slots,
                keep_A=self.keep_A,
                longest_row=self.longest_row,
                compile_blocks=self.compile_blocks,
                gradient_checkpointing=shape.gradient_checkpointing,
            ) as model:
                # Now, or the weights would be kept where they lay before they were laid together.
                weights = {name: linears[name].weight.detach() for name in self.targets}
                self.gains = DoraGains(self.slots, weights) if shape.magnitudes else None
                self.model = model
                began = True
                while True:
                    self._forget_dropped(feed)
                    yield from self._admit(feed)
                    if not self.seats:
                        return
                    is_launched = self._launch()
                    yield from self._probes_made()
                    while len(self.launched) > (self.steps_ahead if is_launched else 0):
                        yield from self._read()
                    for seat in [one for one in self.seats.values() if one.is_complete]:
                        yield self._finish(seat)
                    if feed.wants_snapshot():
                        while self.launched:
                            yield from self._read()
                        for _, seat in sorted(self.seats.items()):
                            yield self._snapshot(seat)
        except RuntimeError as error:
            reason = out_of_memory_reason(error)
            if reason is None:
                raise
        # Not within the handler: the error's traceback would keep tensors alive.
        yield from self._probes_made()
        while self.launched:
            yield from self._read()
        raise _TooLarge(self._park(), reason, began=began)

    def _forget_dropped(self, feed: Feed) -> None:
        for slot, seat in list(self.seats.items()):
            if feed.is_dropped(seat.trial.trial_id):
                del self.seats[slot]
        self.parked = [one for one in self.parked if not feed.is_dropped(one.trial.trial_id)]

    # Coming in ----------------------------------------------------------------------------------

    def _admit(self, feed: Feed) -> Generator[Event]:
        """Fill the free slots."""
        while len(self.seats) < self.shape.num_slots:
            work = self._next(feed)
            if work is None:
                return
            try:
                self._seat(work)
            except RuntimeError as error:
                if out_of_memory_reason(error) is not None:
                    self.parked.insert(0, work)
                raise
            except LoratuneError as error:
                yield Failed(work.trial.trial_id, error)

    def _next(self, feed: Feed) -> Work | None:
        if self.parked:
            return self.parked.pop(0)
        while waiting := feed.waiting():
            begun = [trial for trial in waiting if feed.is_begun(trial)]
            chosen = choose_next(
                begun or waiting,
                [seat.trial for seat in self.seats.values()],
                tokens=self.shape.tokens_per_step,
                mean_row_tokens=self.mean_row_tokens,
            )
            work = feed.claim(chosen)
            if work is not None:
                return work
        return None

    def _seat(self, work: Work) -> None:
        """Put a trial into a free slot: the one it had, if it is free."""
        trial = work.trial
        method = self.find_method(trial.method.name)
        if not isinstance(method, Packable):
            raise StudyError(
                f"method {trial.method.name!r} does not train in packs; use --engine reference"
            )
        free = [slot for slot in range(self.shape.num_slots) if slot not in self.seats]
        data = self.data[trial.data_fingerprint]
        layout = self.slots.layout
        factors = method.adam_factors(trial)
        account, watch = (
            Account(),
            DivergenceWatch(trial.num_updates, vocab_size=self.base.model.config.vocab_size),
        )
        seat = _Seat(
            slot=free[0],
            trial=trial,
            data=data,
            sizes=self.sizes[trial.data_fingerprint],
            method=method,
            factors=(
                factors.get("A", AdamFactors()),
                factors.get("B", AdamFactors()),
                factors.get("other", AdamFactors()),
            ),
            frozen_P=None,
            watch=watch,
            bar=work.bar,
            account=account,
            loss_scale=LossScale.first(self.base.model.dtype),
            probing=probing(trial, self.noise, num_validation_rows=data.facts.num_validation_rows),
        )
        if work.snapshot is None:
            layers = method.start(self.base.model, trial, targets=self.targets)
            seat.has_magnitudes = any(one.magnitude_E is not None for one in layers.values())
            is_corrected = any(one.a0_RD is not None for one in layers.values())
            self._check_room(trial, corrected=is_corrected, magnitudes=seat.has_magnitudes)
            row_P, seat.frozen_P = to_row(layers, layout), frozen_row(layers, layout)
            self.slots.put(seat.slot, row_P, frozen_P=seat.frozen_P, scale=trial.scale)
            # The last one here may have gone in the middle of a batch.
            self.loss_A[seat.slot] = 0
            seat.begin_batch(0)
            if self.gains is not None and seat.has_magnitudes:
                self.gains.refresh([seat.slot])
        else:
            self._restore(seat, work.snapshot, free)
        self.slots.refresh(seat.slot)
        if self.keep_A is not None:
            self.keep_A[seat.slot] = 1 - trial.dropout
        self.seats[seat.slot] = seat

    def _check_room(self, trial: Trial, *, corrected: bool, magnitudes: bool) -> None:
        """A pack without the buffers that a trial needs would train something else.

        Raises:
            StudyError: it has none.
        """
        shape = self.shape
        lacking = [
            what
            for what, is_needed, is_there in (
                (f"rank {trial.rank}", True, trial.rank <= shape.rank),
                ("dropout", trial.dropout > 0, shape.dropout),
                ("a part taken out of the base", corrected, shape.corrected),
                ("magnitudes", magnitudes, shape.magnitudes),
            )
            if is_needed and not is_there
        ]
        if lacking:
            raise StudyError(
                f"trial {trial.trial_id} ({trial.method.name}) needs {', '.join(lacking)}, which "
                f"its pack has no room for ({shape}); if the method starts with more than its "
                "description says, set takes_from_base and has_magnitudes there"
            )

    # One step -----------------------------------------------------------------------------------

    def _launch(self) -> bool:
        """Run the model once over rows of many trials, and update those whose batch is complete.

        False where no trial has a row left to give: all wait for their results.
        """
        self._probe_apart()
        taken = self._take_rows()
        if not taken:
            return False
        rows, tokens = self._rows_of(taken)
        watched = [self.seats[slot] for slot in taken if self.seats[slot].is_watched]
        watcher = self._watcher(watched, rows) if watched else None
        self.model.train_step(rows, into_A=self.loss_A, size=self._size(rows), watcher=watcher)
        if watcher is not None:
            for seat in watched:
                seat.watched.append(watcher.squares[seat.slot])
        done = list[_Done]()
        updates = list[RowUpdate]()
        for slot, count in taken.items():
            seat = self.seats[slot]
            seat.rows_done += count
            if seat.rows_done == len(seat.batch):
                updates.append(seat.row_update())
                done.append(
                    _Done(
                        seat,
                        update=seat.update,
                        attempt=seat.attempt,
                        num_rows=len(seat.batch),
                        num_tokens=int(seat.lengths.sum()),
                        targets=seat.targets,
                    )
                )
        results, event = None, None
        for one in done:
            # Before the update, which moves Adam's second moments.
            if one.seat.watched:
                looked_at = ProbeRows("train", one.seat.data.train, one.seat.batch)
                self._take_down(one.seat, looked_at, torch.cat(one.seat.watched))
        if updates:
            results, event = self._update(updates)
            for one in done:
                one.seat.begin_batch(one.seat.update + 1)
        self.launched.append(_Launched(tuple(done), results, event, tokens))
        # Last: if it does not fit, the updates have been made and must not be made again.
        for one, update in zip(done, updates, strict=True):
            if 0 in update.eps:
                self._clear_beyond_rank(one.seat)
        if self.gains is not None:
            self.gains.refresh([one.seat.slot for one in done if one.seat.has_magnitudes])
        return True

    def _update(self, updates: Sequence[RowUpdate]) -> tuple[Tensor, torch.cuda.Event | None]:
        """Step the rows: float64[2, U] loss sums and gradient norms, there after the event.

        Memory is taken before the first row is stepped: once it is, the update must be made known,
        or it would be made again.
        """
        which = sent(torch.tensor([one.slot for one in updates]), self.device)
        results = self.loss_A[which].expand(2, -1).clone()
        self.loss_A.index_fill_(0, which, 0)
        home, event = results, None
        if self.device.type == "cuda":
            home = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
            event = torch.cuda.Event()
        results[1].copy_(update_rows(self.slots, updates))
        if event is not None:
            home.copy_(results, non_blocking=True)
            event.record(torch.cuda.current_stream(self.device))
        return home, event

    def _clear_beyond_rank(self, seat: _Seat) -> None:
        """Without eps, Adam's step of what only fills a row up to the pack's rank is 0 / 0."""
        layout, params_P = self.slots.layout, self.slots.params_AP[seat.slot]
        own_P = re_lay(params_P.cpu(), layout, layout, rank=seat.trial.rank)
        params_P.copy_(own_P)
        self.slots.refresh(seat.slot)

    def _take_rows(self) -> dict[int, int]:
        demands = [
            Demand(
                slot=slot,
                updates_left=seat.trial.num_updates - seat.update,
                row_tokens=seat.lengths[seat.rows_done :].tolist(),
            )
            for slot, seat in sorted(self.seats.items())
            if not seat.is_through
        ]
        return fill_step(
            demands,
            tokens=self.shape.tokens_per_step,
            rows=self._most_rows(self.shape.tokens_per_step),
        )

    def _rows_of(self, taken: Mapping[int, int]) -> tuple[StepRows, tuple[tuple[_Seat, int], ...]]:
        parts = list[EncodedRows]()
        slots, weights, keys = list[int](), list[float](), list[NDArray[np.int64]]()
        tokens = list[tuple[_Seat, int]]()
        fresh = set[int]()
        for slot, count in taken.items():
            seat = self.seats[slot]
            part = seat.data.train.take(seat.batch[seat.rows_done : seat.rows_done + count])
            parts.append(part)
            tokens.append((seat, len(part.input_ids)))
            slots += [slot] * count
            # Of the whole batch: summed over steps, the gradient is that of the batch's token mean.
            weights += [seat.loss_scale.value / seat.targets] * count
            place = seat.update * seat.trial.batch_size + seat.rows_done
            keys.append(_row_keys(seat.trial.seed, place, count))
            if seat.rows_done == 0:
                fresh.add(slot)
        rows = StepRows(
            rows=concatenate(parts),
            slots=np.array(slots, dtype=np.int64),
            weights=np.array(weights),
            keys=np.concatenate(keys),
            fresh=frozenset(fresh),
        )
        return rows, tuple(tokens)

    def _size(self, rows: StepRows) -> StepSize | None:
        """The smallest compiled size that holds the rows; None where nothing is compiled."""
        if not self.compile_blocks:
            return None
        num_tokens = len(rows.rows.input_ids)
        largest = max(self.shape.tokens_per_step, self.longest_row)
        fitting = [
            math.ceil(largest / part / 64) * 64
            for part in PARTS_OF_A_STEP
            if largest // part >= num_tokens and self._most_rows(largest // part) >= len(rows.rows)
        ]
        chosen = fitting[-1] if fitting else math.ceil(num_tokens / 64) * 64
        return StepSize(
            num_tokens=chosen,
            num_rows=max(self._most_rows(chosen), len(rows.rows))
            + most_filler_rows(num_tokens=chosen, longest_row=self.longest_row),
        )

    def _most_rows(self, tokens: int) -> int:
        """Rows of a step: twice as many as tokens / mean length, so that the bound seldom binds."""
        return max(1, math.ceil(2 * tokens / self.mean_row_tokens))

    # Rows looked at one by one ------------------------------------------------------------------

    def _probes_made(self) -> Generator[Event]:
        while self.probes:
            yield self.probes.popleft()

    def _watcher(self, watched: Sequence[_Seat], rows: StepRows) -> PackedGradients:
        return PackedGradients(
            self.slots,
            [seat.as_probed() for seat in watched],
            row_slots=rows.slots,
            row_offsets=rows.rows.offsets,
        )

    def _take_down(self, seat: _Seat, one: ProbeRows, squares_N32: Tensor) -> None:
        """Note a probe whose rows' gradient stands in the seat's row."""
        probe = probe_record(
            seat.trial,
            update=seat.update,
            split=one.split,
            rows=one.rows,
            indices=one.indices,
            probed=probed_rows(
                self.slots,
                seat.as_probed(),
                squares_N32,
                loss_scale=seat.loss_scale.value,
                has_magnitudes=seat.has_magnitudes,
            ),
        )
        if probe is not None:
            self.probes.append(probe)

    def _probe_apart(self) -> None:
        """Look at rows that do not train now, for the seats at whose update that is due.

        Their gradients lie where those of the batch will: it has not begun, and overwrites them.
        """
        for _, seat in sorted(self.seats.items()):
            if seat.is_through or seat.rows_done or seat.probed_at == seat.update:
                continue
            seat.probed_at = seat.update
            for one in probes_apart(seat.trial, seat.data, seat.probing, update=seat.update):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                began = self.clock()
                self._take_down(seat, one, self._squares_of(seat, one))
                spent = self.clock() - began
                seat.account.seconds += spent
                self.read_at += spent

    def _squares_of(self, seat: _Seat, one: ProbeRows) -> Tensor:
        """float64[N, blocks, kinds] of a pass of its own, without dropout."""
        slot, rows = seat.slot, one.rows.take(one.indices)
        weight = seat.loss_scale.value / num_targets(one.rows, one.indices)
        left: list[int] = rows.lengths.tolist()
        squares, unused_A = list[Tensor](), torch.zeros_like(self.loss_A)
        if self.keep_A is not None:
            self.keep_A[slot] = 1
        begin = 0
        while begin < len(rows):
            count = self._fitting(slot, left[begin:])
            step = StepRows(
                rows=rows.take(np.arange(begin, begin + count)),
                slots=np.full(count, slot, dtype=np.int64),
                weights=np.full(count, weight),
                keys=np.zeros(count, dtype=np.int64),
                fresh=frozenset([slot] if begin == 0 else []),
            )
            watcher = self._watcher([seat], step)
            self.model.train_step(step, into_A=unused_A, watcher=watcher)
            squares.append(watcher.squares[slot])
            begin += count
        if self.keep_A is not None:
            self.keep_A[slot] = 1 - seat.trial.dropout
        return torch.cat(squares)

    def _fitting(self, slot: int, row_tokens: Sequence[int]) -> int:
        """How many of these rows of one slot make a step."""
        (count,) = fill_step(
            [Demand(slot, 1, row_tokens)],
            tokens=self.shape.tokens_per_step,
            rows=self._most_rows(self.shape.tokens_per_step),
        ).values()
        return count

    # Its results --------------------------------------------------------------------------------

    def _read(self) -> Generator[Event]:
        """Take in the results of the oldest step under way."""
        step = self.launched.popleft()
        if step.event is not None:
            step.event.synchronize()
        now = self.clock()
        self._share_out(now - self.read_at, step.tokens)
        self.read_at = now
        if step.results is None:
            return
        for one, (loss_sum, norm) in zip(step.done, step.results.T.tolist(), strict=True):
            seat = one.seat
            if self.seats.get(seat.slot) is not seat or seat.attempt != one.attempt:
                continue
            yield from self._take_in(one, loss_sum=loss_sum, norm=norm)

    def _take_in(self, one: _Done, *, loss_sum: float, norm: float) -> Generator[Event]:
        seat, trial = one.seat, one.seat.trial
        loss = loss_sum / one.targets
        if seat.loss_scale.has_overflowed(loss=loss, norm=norm):
            self._rewind(seat, one.update)
            return
        account = seat.account
        account.losses.append(loss)
        account.grad_norms.append(norm)
        account.targets.append(one.targets)
        account.num_tokens += one.num_tokens
        yield Progress(trial.trial_id, one.update, one.num_rows, loss)
        reason = seat.watch.reason_after(loss, update=one.update, grad_norm=norm)
        status: FinishedStatus = "diverged"
        if reason is None and seat.bar is not None:
            status, reason = "stopped", seat.bar.reason_after(account.losses)
        if reason is not None:
            del self.seats[seat.slot]
            yield Finished(
                self._outcome(seat, status, stopped_at_update=one.update, reason=reason), None
            )

    def _rewind(self, seat: _Seat, update: int) -> None:
        seat.attempt += 1
        self.loss_A[seat.slot] = 0
        seat.begin_batch(update)

    def _finish(self, seat: _Seat) -> Finished:
        began = self.clock()
        validation_loss = self._validation_loss(seat)
        now = self.clock()
        seat.account.seconds += now - began
        self.read_at += now - began
        del self.seats[seat.slot]
        reason = seat.watch.reason_at_end(
            seat.account.train_loss(seat.trial.num_updates), validation_loss
        )
        if reason is not None:
            last = seat.trial.num_updates - 1
            return Finished(
                self._outcome(
                    seat,
                    "diverged",
                    stopped_at_update=last,
                    reason=reason,
                    validation_loss=validation_loss,
                ),
                None,
            )
        outcome = self._outcome(seat, "done", validation_loss=validation_loss)
        return Finished(outcome, self._exported(seat))

    def _validation_loss(self, seat: _Seat) -> float | None:
        rows = seat.data.validation
        if rows is None:
            return None
        everything = np.arange(len(rows))
        left: list[int] = rows.lengths.tolist()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        begin = 0
        while begin < len(rows):
            count = self._fitting(seat.slot, left[begin:])
            chosen = everything[begin : begin + count]
            step = StepRows(
                rows=rows.take(chosen),
                slots=np.full(count, seat.slot, dtype=np.int64),
                weights=np.zeros(count),
                keys=np.zeros(count, dtype=np.int64),
                fresh=frozenset(),
            )
            total += self.model.loss_sum(step, size=self._size(step))
            begin += count
        return float(total) / num_targets(rows, everything)

    def _exported(self, seat: _Seat) -> AdapterFiles:
        layers = from_row(
            self.slots.params_AP[seat.slot].cpu(),
            self.slots.layout,
            rank=seat.trial.rank,
            frozen_P=seat.frozen_P,
            magnitudes=seat.has_magnitudes,
        )
        # In the order of the model, whatever the groups.
        ordered = {name: layers[name] for name in self.targets}
        return seat.method.export_layers(self.base.model, seat.trial, ordered)

    def _outcome(self, seat: _Seat, status: FinishedStatus, **more: object) -> Outcome:
        on_cuda = self.device.type == "cuda"
        longest = int(seat.data.train.lengths.max())
        return seat.account.outcome(
            seat.trial,
            status,
            peak_memory_bytes=torch.cuda.max_memory_reserved(self.device) if on_cuda else None,
            rows_per_microbatch=min(
                seat.trial.batch_size, max(1, self.shape.tokens_per_step // longest)
            ),
            **more,
        )

    @staticmethod
    def _share_out(seconds: float, tokens: Iterable[tuple[_Seat, int]]) -> None:
        """A step's wall time belongs to its trials by their tokens."""
        tokens = list(tokens)
        total = sum(count for _, count in tokens)
        for seat, count in tokens:
            seat.account.seconds += seconds * count / total

    # Snapshots ----------------------------------------------------------------------------------

    def _own_layout(self, seat: _Seat) -> RowLayout:
        """The layout of the trial's snapshots: its own rank, every layer by itself."""
        return lay_out(self.single, rank=seat.trial.rank, magnitudes=seat.has_magnitudes)

    def _snapshot(self, seat: _Seat) -> Snapshot:
        slots, slot, trial = self.slots, seat.slot, seat.trial
        rows = {
            "params": slots.params_AP[slot],
            "first": slots.first_AP[slot],
            "second": slots.second_AP[slot],
            "loss": self.loss_A[slot].reshape(1),
        }
        if seat.rows_done:
            rows["grads"] = slots.grads_AP[slot]
        if seat.watched:
            rows["watched"] = torch.cat(seat.watched)
        if seat.frozen_P is not None:
            # Part of the state: a decomposition that is computed again may differ in its last bits.
            rows["frozen"] = seat.frozen_P
        own = self._own_layout(seat)
        tensors = {
            name: row.cpu().clone()
            if name in ("loss", "watched")
            else re_lay(row.cpu(), slots.layout, own, rank=trial.rank)
            for name, row in rows.items()
        }
        if seat.has_magnitudes:
            # They were worked out together with other trials', whose number moves their last bits.
            for name, rows_AE in self._gains():
                tensors[name] = _re_lay_outputs(rows_AE[slot].cpu(), slots.layout, own)
        return Snapshot(
            trial_id=trial.trial_id,
            update=seat.update,
            tensors=tensors,
            facts={
                **seat.account.facts(),
                "slot": slot,
                "rows_done": seat.rows_done,
                **seat.loss_scale.facts(),
                "has_magnitudes": seat.has_magnitudes,
            },
            engine=PackedEngine.name,
        )

    def _restore(self, seat: _Seat, snapshot: Snapshot, free: Sequence[int]) -> None:
        """Everything as it was when the snapshot was made."""
        facts, trial, layout = snapshot.facts, seat.trial, self.slots.layout
        before = cast("int", facts["slot"])
        seat.slot = before if before in free else free[0]
        seat.account = Account.from_facts(facts)
        seat.account.replay(seat.watch)
        seat.loss_scale.take_over(facts)
        seat.has_magnitudes = cast("bool", facts["has_magnitudes"])
        self._check_room(
            trial, corrected="frozen" in snapshot.tensors, magnitudes=seat.has_magnitudes
        )
        seat.begin_batch(snapshot.update)
        seat.rows_done = cast("int", facts["rows_done"])
        is_probe = seat.probing.of_batch(seat.update, num_rows=len(seat.batch))
        if is_probe and "watched" in snapshot.tensors:
            seat.watched = [snapshot.tensors["watched"].to(self.device)]
        own = self._own_layout(seat)
        rows = {
            name: re_lay(snapshot.tensors[name], own, layout, rank=trial.rank)
            for name in ("params", "first", "second", "grads", "frozen")
            if name in snapshot.tensors
        }
        seat.frozen_P = rows.get("frozen")
        slots, slot = self.slots, seat.slot
        slots.put(slot, _filled(rows["params"], layout), frozen_P=seat.frozen_P, scale=trial.scale)
        slots.first_AP[slot].copy_(_filled(rows["first"], layout))
        slots.second_AP[slot].copy_(_filled(rows["second"], layout))
        if "grads" in rows:
            slots.grads_AP[slot].copy_(_filled(rows["grads"], layout))
        self.loss_A[slot] = snapshot.tensors["loss"][0].to(self.device)
        if seat.has_magnitudes and "gain" in snapshot.tensors:
            for name, rows_AE in self._gains():
                rows_AE[slot].copy_(_re_lay_outputs(snapshot.tensors[name], own, layout))
        elif seat.has_magnitudes and self.gains is not None:
            self.gains.refresh([slot])

    def _gains(self) -> list[tuple[str, Tensor]]:
        """DoRA's factors of all slots, by their names in snapshots."""
        gain_AE, inverse_norm_AE = self.slots.gain_AE, self.slots.inverse_norm_AE
        assert gain_AE is not None
        assert inverse_norm_AE is not None
        return [("gain", gain_AE), ("inverse_norm", inverse_norm_AE)]

    def _park(self) -> list[Work]:
        """Every seat as work to go on with, at the beginning of its batch under way."""
        works = list[Work]()
        for seat in self.seats.values():
            self._rewind(seat, seat.update)
            snapshot = self._snapshot(seat)
            # DoRA's factors may be what did not fit: they are worked out anew.
            tensors = {
                name: tensor
                for name, tensor in snapshot.tensors.items()
                if name not in ("gain", "inverse_norm")
            }
            works.append(Work(seat.trial, replace(snapshot, tensors=tensors), seat.bar))
        self.seats.clear()
        return works + self.parked


def _filled(row_P: Tensor, layout: RowLayout) -> Tensor:
    """A row without m as one with: zeros at its end."""
    return torch.cat([row_P, row_P.new_zeros(layout.size - len(row_P))])


def _re_lay_outputs(values_E: Tensor, source: RowLayout, target: RowLayout) -> Tensor:
    """A number for each output, laid out as m is in one layout, in another."""
    row_P = torch.cat([values_E.new_zeros(source.ends[1]), values_E])
    return re_lay(row_P, source, target, rank=0)[target.ends[1] :].clone()


def _row_keys(seed: int, place: int, count: int) -> NDArray[np.int64]:
    """A number for each of `count` rows from `place` on in the stream of a seed."""
    start = (seed * 0xD1342543DE82EF95 + place) % 2**63
    return (np.arange(count, dtype=np.uint64) + np.uint64(start)).astype(np.int64)

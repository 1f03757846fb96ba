"""The reference engine: one adapter, PEFT, one loop. Slow, obvious, and the oracle of every other.

What it promises: the loss is the token mean over the whole batch, however it is cut; every update
but the last has exactly `batch_size` rows; adapter weights, gradients and AdamW's state are float32
over a frozen base in the study's precision; in float16 losses are scaled; the seed moves row order,
dropout and, where the method draws one, the initialisation, and nothing else does.

What it does not: rows are padded to the longest of their micro-batch, so short rows waste work, and
dropout masks depend on how a batch is cut. Bit-equal repeats hold on one machine with one number of
threads; on CUDA only as far as PyTorch's deterministic kernels reach.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import hashlib
import time
from collections.abc import Callable, Generator, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.order import row_order
from loratune.data.prepare import PreparedData
from loratune.data.rows import EncodedRows, cut_microbatches
from loratune.engine.account import Account
from loratune.engine.base import Event, Feed, Finished, Progress, Snapshot, Work
from loratune.engine.divergence import DivergenceWatch
from loratune.engine.hooked_gradients import HookedGradients
from loratune.engine.loss import mean_token_loss, microbatches, num_targets, target_loss_sum
from loratune.engine.loss_scale import LossScale
from loratune.engine.memory import out_of_memory_reason, release_memory
from loratune.engine.row_gradients import ProbeRows, probe_record, probes_apart
from loratune.methods import load_method
from loratune.methods.base import Attached, Method
from loratune.models.load import Base
from loratune.models.targets import target_modules
from loratune.planning.bar import Bar
from loratune.planning.horizon import lr_factor
from loratune.planning.probes import probing
from loratune.records import FinishedStatus, NoiseProbe, NoiseSchedule, Outcome, Trial


class ReferenceEngine:
    """Trains one trial after another on one resident base.

    `data` is keyed by data fingerprint; `tokens_per_microbatch` bounds what of a trial goes through
    the model at once (padding counted) and is halved when the device runs out of memory.
    """

    name = "reference"

    def __init__(
        self,
        base: Base,
        data: Mapping[str, PreparedData],
        *,
        tokens_per_microbatch: Callable[[Trial], int],
        noise: NoiseSchedule | None = None,
        find_method: Callable[[str], Method] = load_method,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._base = base
        self._data = data
        self._noise = noise
        self._tokens_per_microbatch = tokens_per_microbatch
        self._find_method = find_method
        self._clock = clock

    def train(self, feed: Feed) -> Generator[Event]:
        """See `engine.base.Engine`. What a trial raises ends the training: it alone is under way.

        Out of memory, a trial starts again with half the tokens.
        """
        while waiting := feed.waiting():
            work = feed.claim(waiting[0])
            if work is not None:
                yield from self._train(work, feed)

    def _train(self, work: Work, feed: Feed) -> Generator[Event]:
        trial, snapshot = work.trial, work.snapshot
        rows = self._data[trial.data_fingerprint]
        longest = int(rows.train.lengths.max())
        budget = self._tokens_per_microbatch(trial)
        started = self._clock()
        while True:
            run = _Run(
                trial,
                self._base,
                rows,
                method=self._find_method(trial.method.name),
                noise=self._noise,
                tokens_per_microbatch=budget,
                clock=self._clock,
            )
            try:
                yield from run.events(snapshot, feed, bar=work.bar)
                return
            except RuntimeError as error:
                reason = out_of_memory_reason(error)
                if reason is None:
                    raise
            release_memory(self._base.device)
            if budget <= longest:
                yield Finished(_out_of_memory(trial, reason, self._clock() - started), None)
                return
            # A snapshot holds the cut it was made with, which is the one that did not fit.
            snapshot = None
            budget = max(longest, budget // 2)


class _Run:
    """One trial on one device with one cut into micro-batches."""

    def __init__(
        self,
        trial: Trial,
        base: Base,
        rows: PreparedData,
        *,
        method: Method,
        noise: NoiseSchedule | None,
        tokens_per_microbatch: int,
        clock: Callable[[], float],
    ) -> None:
        num_held_out = len(rows.validation) if rows.validation is not None else 0
        self.probing = probing(trial, noise, num_validation_rows=num_held_out)
        self.trial = trial
        self.method = method
        self.base = base
        self.rows = rows
        self.tokens_per_microbatch = tokens_per_microbatch
        self.clock = clock
        self.account = Account()
        self.loss_scale = LossScale.first(base.model.dtype)
        self._pad_id = cast("int", base.tokenizer.pad_token_id)

    def events(self, snapshot: Snapshot | None, feed: Feed, *, bar: Bar | None) -> Generator[Event]:
        trial, base = self.trial, self.base
        if base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(base.device)
        # Dropout is all that draws from torch's global generators; methods draw from their own.
        torch.manual_seed(_seed("dropout", trial.seed))
        targets = target_modules(base.model, trial.targets)
        attached = self.method.attach(base.model, trial, targets=targets)
        try:
            optimizer = _optimizer(attached, trial)
            watch = DivergenceWatch(trial.num_updates, vocab_size=base.model.config.vocab_size)
            first = 0
            if snapshot is not None:
                first = self._restore(snapshot, attached, optimizer, watch)
            since, before = self.clock(), self.account.seconds
            attached.model.train()
            for update in range(first, trial.num_updates):
                for one in probes_apart(trial, self.rows, self.probing, update=update):
                    probe = self._probe_apart(one, update, attached, optimizer)
                    if probe is not None:
                        yield probe
                probe, reason = self._update(update, attached, optimizer, watch)
                self.account.seconds = before + self.clock() - since
                if probe is not None:
                    yield probe
                num_rows = self._num_rows(update)
                yield Progress(trial.trial_id, update, num_rows, self.account.losses[-1])
                status: FinishedStatus = "diverged"
                if reason is None and bar is not None:
                    status, reason = "stopped", bar.reason_after(self.account.losses)
                if reason is not None:
                    yield Finished(self._outcome(status, update=update, reason=reason), None)
                    return
                if feed.is_dropped(trial.trial_id):
                    return
                if update + 1 < trial.num_updates and feed.wants_snapshot():
                    yield self._snapshot(update + 1, attached, optimizer)
            validation_loss = self._validation_loss(attached)
            self.account.seconds = before + self.clock() - since
            reason = watch.reason_at_end(
                self.account.train_loss(trial.num_updates), validation_loss
            )
            if reason is not None:
                outcome = self._outcome(
                    "diverged", update=trial.num_updates - 1, reason=reason, loss=validation_loss
                )
                yield Finished(outcome, None)
                return
            yield Finished(self._outcome("done", loss=validation_loss), attached.export())
        finally:
            attached.detach()

    def _num_rows(self, update: int) -> int:
        is_last = update == self.trial.num_updates - 1
        return self.trial.last_batch_size if is_last else self.trial.batch_size

    def _update(
        self,
        update: int,
        attached: Attached,
        optimizer: torch.optim.AdamW,
        watch: DivergenceWatch,
    ) -> tuple[NoiseProbe | None, str | None]:
        """One optimizer step over one whole batch: what its rows' gradients were, if they are
        looked at, and the reason if the trial diverged with it."""
        trial, train = self.trial, self.rows.train
        indices = row_order(
            trial.seed,
            num_rows=trial.num_train_rows,
            start=update * trial.batch_size,
            count=self._num_rows(update),
        )
        targets = num_targets(train, indices)
        groups = attached.parameter_groups()
        while True:
            probe, total, norm = self._gradients(indices, update, attached, optimizer)
            batch_loss, grad_norm = float(total) / targets, float(norm)
            if not self.loss_scale.has_overflowed(loss=batch_loss, norm=grad_norm):
                break
            optimizer.zero_grad(set_to_none=True)
        if trial.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                [parameter for group in groups for parameter in group.parameters],
                trial.max_grad_norm,
                norm,
            )
        self.account.losses.append(batch_loss)
        self.account.grad_norms.append(grad_norm)
        self.account.targets.append(targets)
        self.account.num_tokens += int(train.lengths[indices].sum())
        reason = watch.reason_after(batch_loss, update=update, grad_norm=grad_norm)
        if reason is not None:
            return probe, reason

        factor = lr_factor(
            trial.schedule,
            update=update,
            num_updates=trial.num_updates,
            warmup=trial.warmup_steps,
        )
        for group, settings in zip(groups, optimizer.param_groups, strict=True):
            settings["lr"] = trial.learning_rate * factor * group.lr_factor
        optimizer.step()
        attached.after_backward(update)
        optimizer.zero_grad(set_to_none=True)
        return probe, None

    def _gradients(
        self,
        indices: NDArray[np.int64],
        update: int,
        attached: Attached,
        optimizer: torch.optim.AdamW,
    ) -> tuple[NoiseProbe | None, Tensor, Tensor]:
        """The batch's gradient into the parameters, the loss scale taken out of it again.

        What its rows' gradients were, if they are looked at; the summed token losses in nats,
        float64; the gradient's norm.
        """
        probe = None
        if self.probing.of_batch(update, num_rows=len(indices)):
            looked_at = ProbeRows("train", self.rows.train, indices)
            probe, total = self._probe(looked_at, update, attached, optimizer)
        else:
            total = self._backward(attached, self.rows.train, indices)
        penalty = attached.penalty()
        if penalty is not None:
            (penalty * self.loss_scale.value).backward()
        gradients = [
            parameter.grad
            for group in attached.parameter_groups()
            for parameter in group.parameters
            if parameter.grad is not None
        ]
        if self.loss_scale.is_needed:
            for gradient in gradients:
                gradient.div_(self.loss_scale.value)
        return probe, total, torch.nn.utils.get_total_norm(gradients)

    def _backward(
        self,
        attached: Attached,
        rows: EncodedRows,
        indices: NDArray[np.int64],
        *,
        watching: HookedGradients | None = None,
    ) -> Tensor:
        """The gradient of the rows' token mean, times the loss scale; the sum of their losses."""
        targets = num_targets(rows, indices)
        total = torch.zeros((), dtype=torch.float64, device=self.base.device)
        for part in microbatches(
            rows,
            indices,
            pad_id=self._pad_id,
            device=self.base.device,
            tokens_per_microbatch=self.tokens_per_microbatch,
        ):
            if watching is not None:
                watching.begin(len(part.input_ids_BT), self.base.device)
            loss = target_loss_sum(attached.model, part)
            # Divided by the targets of the whole batch: summed over the parts, the gradient is
            # that of the batch's token mean, whatever the cut.
            (loss / targets * self.loss_scale.value).backward()
            total += loss.detach()
        return total

    def _probe(
        self, one: ProbeRows, update: int, attached: Attached, optimizer: torch.optim.AdamW
    ) -> tuple[NoiseProbe | None, Tensor]:
        """`_backward` of rows that are looked at one by one."""
        watched = HookedGradients(attached, optimizer, self.trial, loss_scale=self.loss_scale.value)
        with watched.watching() as watching:
            total = self._backward(attached, one.rows, one.indices, watching=watching)
        cuts = cut_microbatches(
            one.rows.lengths[one.indices], tokens_per_microbatch=self.tokens_per_microbatch
        )
        probe = probe_record(
            self.trial,
            update=update,
            split=one.split,
            rows=one.rows,
            indices=one.indices[np.concatenate(cuts)],
            probed=watching.end(),
        )
        return probe, total

    def _probe_apart(
        self, one: ProbeRows, update: int, attached: Attached, optimizer: torch.optim.AdamW
    ) -> NoiseProbe | None:
        """A probe in a pass of its own, without dropout; nothing of it is left."""
        attached.model.eval()
        probe, _ = self._probe(one, update, attached, optimizer)
        optimizer.zero_grad(set_to_none=True)
        attached.model.train()
        return probe

    def _validation_loss(self, attached: Attached) -> float | None:
        if self.rows.validation is None:
            return None
        return mean_token_loss(
            attached.model,
            self.rows.validation,
            pad_id=self._pad_id,
            device=self.base.device,
            tokens_per_microbatch=self.tokens_per_microbatch,
        )

    def _outcome(
        self,
        status: FinishedStatus,
        *,
        update: int | None = None,
        reason: str | None = None,
        loss: float | None = None,
    ) -> Outcome:
        device = self.base.device
        return self.account.outcome(
            self.trial,
            status,
            validation_loss=loss,
            peak_memory_bytes=(
                torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            ),
            rows_per_microbatch=self._rows_per_microbatch(),
            stopped_at_update=update,
            reason=reason,
        )

    def _rows_per_microbatch(self) -> int:
        """Rows that fit the token budget when all are as long as the longest one."""
        longest = int(self.rows.train.lengths.max())
        return min(self.trial.batch_size, max(1, self.tokens_per_microbatch // longest))

    def _snapshot(self, update: int, attached: Attached, optimizer: torch.optim.AdamW) -> Snapshot:
        tensors = {
            f"adapter.{name}": tensor.detach().cpu().clone()
            for name, tensor in attached.state().items()
        }
        state = cast("dict[int, dict[str, Tensor]]", optimizer.state_dict()["state"])
        for index, moments in state.items():
            for name, tensor in moments.items():
                tensors[f"optimizer.{index}.{name}"] = tensor.detach().cpu().clone()
        tensors["random.cpu"] = torch.get_rng_state()
        if self.base.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.base.device)
        return Snapshot(
            trial_id=self.trial.trial_id,
            update=update,
            tensors=tensors,
            facts={
                **self.account.facts(),
                **self.loss_scale.facts(),
                "tokens_per_microbatch": self.tokens_per_microbatch,
            },
            engine=ReferenceEngine.name,
        )

    def _restore(
        self,
        snapshot: Snapshot,
        attached: Attached,
        optimizer: torch.optim.AdamW,
        watch: DivergenceWatch,
    ) -> int:
        """Everything as it was when the snapshot was made; the update to go on with."""
        facts, tensors = snapshot.facts, snapshot.tensors
        self.account = Account.from_facts(facts)
        # The cut decides rounding: going on with another one would not be bit-equal.
        self.tokens_per_microbatch = cast("int", facts["tokens_per_microbatch"])
        self.account.replay(watch)
        self.loss_scale.take_over(facts)
        attached.load_state(
            {
                name.removeprefix("adapter."): tensor
                for name, tensor in tensors.items()
                if name.startswith("adapter.")
            }
        )
        state = dict[int, dict[str, Tensor]]()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                state.setdefault(int(index), {})[moment] = tensor
        settings = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": settings})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.base.device)
        return snapshot.update


def _optimizer(attached: Attached, trial: Trial) -> torch.optim.AdamW:
    """AdamW with a group of settings for each of the method's parameter groups."""
    return torch.optim.AdamW(
        [
            {
                "params": group.parameters,
                "lr": trial.learning_rate * group.lr_factor,
                "eps": trial.eps * group.eps_factor,
                "weight_decay": trial.weight_decay * group.weight_decay_factor,
            }
            for group in attached.parameter_groups()
        ],
        betas=(trial.beta1, trial.beta2),
    )


def _seed(purpose: str, seed: int) -> int:
    """A seed of 63 bits for one purpose, so that purposes never share a stream."""
    digest = hashlib.sha256(f"loratune:{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _out_of_memory(trial: Trial, reason: str, seconds: float) -> Outcome:
    return Account(seconds=seconds).outcome(
        trial,
        "out_of_memory",
        peak_memory_bytes=None,
        rows_per_microbatch=1,
        reason=f"not even one row a micro-batch fits: {reason}",
    )

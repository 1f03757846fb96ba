"""Small random data sets and trials for engine tests: rows of random tokens, nothing to learn."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from feeds import ListFeed
from loratune.data.prepare import PreparedData, fingerprint
from loratune.data.rows import EncodedRows, lay_end_to_end
from loratune.engine.base import Finished, Progress, Snapshot
from loratune.engine.reference import ReferenceEngine
from loratune.methods.adapter_files import AdapterFiles
from loratune.models.load import Base
from loratune.planning.bar import Bar
from loratune.planning.horizon import horizon
from loratune.records import DataFacts, DataSummary, Outcome, Trial
from loratune.study.methods import choose, describe
from loratune.study.schema import Protocol
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer


def random_rows(num_rows: int, *, seed: int, longest: int = 12) -> EncodedRows:
    """Rows of 4 to `longest` tokens, the prompt a third of them."""
    generator = np.random.default_rng(seed)
    ids, targets = list[list[int]](), list[list[bool]]()
    for _ in range(num_rows):
        length = int(generator.integers(4, longest + 1))
        prompt = max(1, length // 3)
        ids.append(generator.integers(4, VOCAB_SIZE, size=length).tolist())
        targets.append([False] * prompt + [True] * (length - prompt))
    return lay_end_to_end(ids, targets)


def random_data(num_rows: int = 40, *, num_validation: int = 8, seed: int = 0) -> PreparedData:
    train = random_rows(num_rows, seed=seed)
    validation = random_rows(num_validation, seed=seed + 1) if num_validation else None
    lengths = train.lengths
    facts = DataFacts(
        fingerprint=fingerprint(train, validation),
        num_train_rows=num_rows,
        num_validation_rows=num_validation,
        num_tokens=int(lengths.sum()),
        sum_squared_tokens=int((lengths**2).sum()),
        num_target_tokens=int(train.is_target.sum()),
        max_row_tokens=int(lengths.max()),
    )
    summary = DataSummary(
        source="random",
        num_source_rows=num_rows + num_validation,
        num_dropped_too_long=0,
        num_truncated=0,
        num_validation_rows=num_validation,
        num_validation_groups=num_validation,
        num_left_over=0,
        num_train_rows=num_rows,
        num_duplicate_rows=0,
    )
    return PreparedData(train, validation, (), (), facts, summary)


def tiny_base(
    family: str = "llama", *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Base:
    model = tiny_model(family)
    model.requires_grad_(False)
    to: Any = model.to  # transformers wraps nn.Module.to untyped
    to(device, dtype)
    return Base(
        model=model,
        tokenizer=tiny_tokenizer(),
        source="tiny",
        fingerprint="tiny",
        device=torch.device("cuda:0" if device == "cuda" else device),
    )


def tiny_trial(data: PreparedData, *, method: str = "lora", **changes: Any) -> Trial:
    """A LoRA trial of rank 4 on every linear layer; `changes` are fields of Trial or `options`."""
    options = changes.pop("options", {})
    batch_size = changes.pop("batch_size", 8)
    steps = changes.pop("steps", None)
    epochs = None if steps else changes.pop("epochs", 1.0)
    kind = "fixed_steps" if steps else "fixed_samples"
    length = horizon(
        Protocol(kind=kind, epochs=epochs, steps=steps),
        num_train_rows=data.facts.num_train_rows,
        batch_size=batch_size,
    )
    rank, alpha = changes.pop("rank", 4), changes.pop("alpha", 8.0)
    trial = Trial(
        trial_id="trial-test",
        provisional=False,
        model="tiny",
        model_fingerprint="tiny",
        precision="float32",
        data_fingerprint=data.facts.fingerprint,
        rows=None,
        num_train_rows=data.facts.num_train_rows,
        method=choose(method, options),
        rank=rank,
        alpha=alpha,
        scale=describe(method).scale_of(rank=rank, alpha=alpha),
        targets=("all-linear",),
        dropout=0.0,
        batch_size=batch_size,
        learning_rate=1e-2,
        seed=0,
        protocol=kind,
        epochs=epochs,
        steps=steps,
        num_updates=length.num_updates,
        last_batch_size=length.last_batch_size,
        num_samples=length.num_samples,
        schedule="cosine",
        warmup_steps=0,
        optimizer="adamw",
        beta1=0.9,
        beta2=0.999,
        beta2_rule="fixed",
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=None,
    )
    return replace(trial, **changes)


def train(
    trial: Trial,
    data: PreparedData,
    *,
    base: Base | None = None,
    tokens_per_microbatch: int = 10_000,
    snapshot: Snapshot | None = None,
    bar: Bar | None = None,
    **engine: Any,
) -> tuple[Outcome, AdapterFiles | None]:
    """The whole trial on the reference engine."""
    made = ReferenceEngine(
        base or tiny_base(),
        {trial.data_fingerprint: data},
        tokens_per_microbatch=lambda _: tokens_per_microbatch,
        **engine,
    )
    updates = list[int]()
    bars = {} if bar is None else {trial.trial_id: bar}
    for event in made.train(ListFeed([trial], {trial.trial_id: snapshot}, bars=bars)):
        if isinstance(event, Progress):
            updates.append(event.update)
        if isinstance(event, Finished):
            first = snapshot.update if snapshot is not None else 0
            assert updates == list(range(first, first + len(updates)))
            return event.outcome, event.adapter
    raise AssertionError("the engine ended without an outcome")

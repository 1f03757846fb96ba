"""Rows of random tokens to time training on, and trials over them that outlast any measurement."""

import numpy as np

from loratune.data.prepare import PreparedData, fingerprint
from loratune.data.rows import lay_end_to_end
from loratune.planning.horizon import horizon
from loratune.records import DataFacts, DataSummary, Trial
from loratune.study.methods import choose, describe
from loratune.study.schema import Protocol
from model_shapes import TARGETS, Shape

NUM_ROWS = 4096
# A study of one grid has many learning rates and few seeds.
NUM_SEEDS = 3
# More updates than a measurement can make, so that slots stay full.
STEPS = 1_000_000

# Rows of GSM8K's training file by length, {centre of a bin of 16 tokens: rows}: the Alpaca
# template around the question, the answer without its <<...>> annotations, one end token, at an
# assumed 3.9 characters a token. An estimate: no tokenizer was asked. Mean 160 tokens.
GSM8K_LENGTHS = {
    56: 2,
    72: 27,
    88: 325,
    104: 758,
    120: 1100,
    136: 1055,
    152: 985,
    168: 801,
    184: 686,
    200: 521,
    216: 362,
    232: 300,
    248: 187,
    264: 128,
    280: 82,
    296: 65,
    312: 32,
    328: 20,
    344: 16,
    360: 7,
    376: 6,
    392: 2,
    408: 1,
    440: 3,
    456: 1,
    472: 1,
}


def equal_rows(shape: Shape, *, num_rows: int = NUM_ROWS, seed: int = 0) -> PreparedData:
    """Rows of `shape.row_tokens` tokens; every token but the first carries loss."""
    return _rows(shape, np.full(num_rows, shape.row_tokens), seed=seed)


def gsm8k_like_rows(shape: Shape, *, num_rows: int = NUM_ROWS, seed: int = 0) -> PreparedData:
    """Rows as long as GSM8K's are, uniform within each bin of the histogram."""
    generator = np.random.default_rng(seed)
    centres = np.array(list(GSM8K_LENGTHS))
    shares = np.array(list(GSM8K_LENGTHS.values())) / sum(GSM8K_LENGTHS.values())
    lengths = generator.choice(centres, size=num_rows, p=shares)
    return _rows(shape, lengths + generator.integers(-8, 8, size=num_rows), seed=seed)


def mean_gsm8k_tokens() -> float:
    """The mean length of `gsm8k_like_rows`."""
    return sum(length * num for length, num in GSM8K_LENGTHS.items()) / sum(GSM8K_LENGTHS.values())


def long_trial(
    data: PreparedData,
    *,
    slot: int,
    batch_size: int,
    rank: int,
    alpha: float = 16.0,
    method: str = "lora",
    model: str = "random",
    steps: int = STEPS,
) -> Trial:
    """Trial number `slot` of a pack: its own learning rate, one of a few seeds, no end in sight."""
    num_train_rows = data.facts.num_train_rows
    length = horizon(
        Protocol(kind="fixed_steps", steps=steps),
        num_train_rows=num_train_rows,
        batch_size=batch_size,
    )
    return Trial(
        trial_id=f"trial-{slot}",
        provisional=False,
        model=model,
        model_fingerprint=model,
        precision="bfloat16",
        data_fingerprint=data.facts.fingerprint,
        rows=None,
        num_train_rows=num_train_rows,
        method=choose(method, {}),
        rank=rank,
        alpha=alpha,
        scale=describe(method).scale_of(rank=rank, alpha=alpha),
        targets=TARGETS,
        dropout=0.0,
        batch_size=batch_size,
        # Small and never the same: nothing is to be learned from random tokens, nor to diverge.
        learning_rate=1e-6 * (1 + slot),
        seed=slot % NUM_SEEDS,
        protocol="fixed_steps",
        epochs=None,
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


def _rows(shape: Shape, lengths: np.ndarray, *, seed: int) -> PreparedData:
    generator = np.random.default_rng(seed)
    train = lay_end_to_end(
        [generator.integers(4, shape.vocab_size, size=length).tolist() for length in lengths],
        [[False] + [True] * (length - 1) for length in lengths.tolist()],
    )
    num_rows = len(train)
    facts = DataFacts(
        fingerprint=fingerprint(train, None),
        num_train_rows=num_rows,
        num_validation_rows=0,
        num_tokens=int(train.lengths.sum()),
        sum_squared_tokens=int((train.lengths**2).sum()),
        num_target_tokens=int(train.is_target.sum()),
        max_row_tokens=int(train.lengths.max()),
    )
    summary = DataSummary(
        source="random",
        num_source_rows=num_rows,
        num_dropped_too_long=0,
        num_truncated=0,
        num_validation_rows=0,
        num_validation_groups=0,
        num_left_over=0,
        num_train_rows=num_rows,
        num_duplicate_rows=0,
    )
    return PreparedData(train, None, (), (2,), facts, summary)

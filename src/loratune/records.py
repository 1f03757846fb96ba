"""The frozen records that one stage hands the next. No torch, no pandas, no behaviour.

The words are the project's: a *trial* is one fine-tuning run, a point of the study; an *outcome* is
what it produced, divergence included; a *score* is one task's count of right and wrong answers.
Counts start with `num_`, units stand in the name, `None` means absent, never zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

Status = Literal["planned", "running", "done", "diverged", "stopped", "out_of_memory", "failed"]
Purpose = Literal["search", "adaptive", "confirm"]
FinishedStatus = Literal["done", "diverged", "stopped", "out_of_memory", "failed"]

# Statuses whose outcome stands: asking for the trial again does not train it again. `failed` and
# `out_of_memory` are tried anew by the next `loratune run`, as a new attempt.
FINAL_STATUSES: tuple[str, ...] = ("done", "diverged", "stopped")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """`count` linear layers that share the leaf name `name` and map in_features to out_features."""

    name: str
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning needs of a base model, read from the model itself or declared by a preset.

    `num_block_parameters` counts the linear weights inside the decoder blocks (N in the cost
    formula), `attention_width` is heads x head_dim, `sliding_window` the window of the layers that
    have one, `num_sliding_layers` how many do. `linears` are the decoder's linears, head excluded.
    `model_type` is transformers' name of the architecture; None where it was declared.
    """

    source: str
    fingerprint: str
    num_parameters: int
    num_block_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    attention_width: int
    vocab_size: int
    linears: tuple[LinearShape, ...]
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    provisional: bool = False
    model_type: str | None = None


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What planning needs of one prepared data set (one tokenizer, one choice of N).

    Token counts are over the training rows, templates and EOS included. `sum_squared_tokens` is the
    sum of squared row lengths, so that S = sum_squared_tokens / num_tokens. `fingerprint` hashes
    the exact token rows of training and validation and the loss masks; it is provisional where the
    rows could not be reached and the counts are declared.
    """

    fingerprint: str
    num_train_rows: int
    num_validation_rows: int
    num_tokens: int
    sum_squared_tokens: int
    num_target_tokens: int
    max_row_tokens: int
    provisional: bool = False


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What happened to the rows on their way from the file to the trainer; every row is accounted.

    num_source_rows = num_dropped_too_long + num_validation_rows + num_left_over + num_train_rows
    where a validation file is not given; where one is, the validation rows are not in that sum.
    Dropped rows were longer than `max_tokens`, or had no token with loss within it.
    `num_truncated` rows, of training and validation source, are kept, cut to `max_tokens`.
    `num_validation_dropped` counts rows of a validation file that were too long.
    `num_in_test` maps a task's name to how many training rows have the same normalised question as
    one of its test questions. `num_duplicate_rows` counts training rows whose normalised question
    already stood in an earlier training row; `num_in_validation` those whose normalised question is
    also that of a validation row, which a `group_by` or a validation file allows.
    `validation_sources` numbers the source of each validation row, in their order, from 0; empty
    where no two rows share one.
    """

    source: str
    num_source_rows: int
    num_dropped_too_long: int
    num_truncated: int
    num_validation_rows: int
    num_validation_groups: int
    num_left_over: int
    num_train_rows: int
    num_duplicate_rows: int
    num_in_test: tuple[tuple[str, int], ...] = ()
    num_in_validation: int = 0
    num_validation_dropped: int = 0
    validation_sources: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """A LoRA variant and its options, every default filled in, options sorted by name."""

    name: str
    options: tuple[tuple[str, float | int | str | bool | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """One fine-tuning run with every derived number explicit; the engine consults no default.

    `trial_id` hashes everything that can change the trial's numbers; it is provisional where model
    or data were declared, not read. `scale` multiplies BA (alpha/r, or alpha/sqrt(r) for rslora).
    Update t of `num_updates` (from 0) covers rows t*batch_size ... of the endless row order;
    the last one holds `last_batch_size` rows. `epochs` is set for protocol fixed_samples, `steps`
    for fixed_steps. `beta2` is a plain number here, whatever rule the study gave.
    """

    trial_id: str
    provisional: bool
    model: str
    model_fingerprint: str
    precision: str
    data_fingerprint: str
    rows: int | None
    num_train_rows: int
    method: MethodChoice
    rank: int
    alpha: float
    scale: float
    targets: tuple[str, ...]
    dropout: float
    batch_size: int
    learning_rate: float
    seed: int
    protocol: Literal["fixed_samples", "fixed_steps"]
    epochs: float | None
    steps: int | None
    num_updates: int
    last_batch_size: int
    num_samples: int
    schedule: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    optimizer: str
    beta1: float
    beta2: float
    beta2_rule: str
    eps: float
    weight_decay: float
    max_grad_norm: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial produced. Losses are token means in nats.

    `train_loss` is over the last 10% of updates, `validation_loss` over all validation target
    tokens at the final weights; both are None where they do not exist. `num_updates` counts the
    updates made, `num_tokens` the tokens trained on (padding excluded), `seconds` wall time.
    `stopped_at_update` and `reason` say when and why a trial diverged, stopped or failed;
    `error` holds the traceback of a failed one.
    """

    trial_id: str
    status: FinishedStatus
    num_updates: int
    train_loss: float | None
    validation_loss: float | None
    seconds: float
    num_tokens: int
    peak_memory_bytes: int | None
    rows_per_microbatch: int | None
    stopped_at_update: int | None = None
    reason: str | None = None
    error: str | None = None
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """When gradients are looked at row by row: one row of `every` that train, whatever the batch.

    A probe of training rows takes every `every`-th batch as it is; batches below
    `planning.probes.FEWEST_ROWS` rows are too small for that, and `rows` rows are pooled at frozen
    weights instead. `held_out_rows` validation rows are looked at as well; None: none are.
    """

    every: int
    rows: int
    held_out_rows: int | None = None


@dataclass(frozen=True, slots=True)
class BlockSums:
    """What one block of an adapter's parameters adds to a probe of n examples' gradients g_i.

    `sum_squares` is the sum of |g_i|^2, `mean_square` |mean of g_i|^2. The scaled ones are those of
    P g_i, P = 1 / sqrt(v) with Adam's second moment v (corrected for its bias) before the update,
    without eps; coordinates where v is 0, or below 1e-10 of the block's largest (float32 rounds it
    away), are left out. None where v is 0 everywhere.
    """

    block: Literal["A", "B", "other"]
    sum_squares: float
    mean_square: float
    scaled_sum_squares: float | None = None
    scaled_mean_square: float | None = None


@dataclass(frozen=True, slots=True)
class NoiseProbe:
    """Gradients of single examples at the weights before update `update`, summed up.

    `num_rows` rows were looked at, which hold `num_examples` different ones: equal rows are one
    example (its gradient is their sum, times examples / rows). With T_j target tokens in row j,
    g_i = (sum of i's token losses)' * num_rows / sum_j T_j, so that the mean of g_i is the gradient
    of the token mean. `split` is "train" or "validation".
    """

    trial_id: str
    update: int
    split: Literal["train", "validation"]
    num_rows: int
    num_examples: int
    num_targets: int
    num_tokens: int
    blocks: tuple[BlockSums, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a trial was run: kept beside its identity, never part of it."""

    engine: str
    device: str
    versions: tuple[tuple[str, str], ...]
    commit: str | None
    host: str
    pid: int


class ScoreKey(NamedTuple):
    """What was asked and how it was judged: scores with equal keys of a trial are comparable."""

    task: str
    task_version: str
    grader: str
    decoding: str


@dataclass(frozen=True, slots=True)
class Score:
    """One task's account for one adapter: total = correct + wrong + truncated + errors.

    `split` is "validation" (rows of the training data) or "test". `truncated` answers ran into the
    token limit without one that could be graded; `errors` could not be graded at all.
    """

    task: str
    task_version: str
    grader: str
    decoding: str
    split: Literal["validation", "test"]
    correct: int
    wrong: int
    truncated: int
    errors: int

    @property
    def key(self) -> ScoreKey:
        """What was asked and how it was judged."""
        return ScoreKey(self.task, self.task_version, self.grader, self.decoding)

    @property
    def total(self) -> int:
        """Questions asked."""
        return self.correct + self.wrong + self.truncated + self.errors

    @property
    def accuracy(self) -> float:
        """correct / total, a fraction."""
        return self.correct / self.total


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote: the text without special tokens, ending before the first stop string.

    Of a question with choices `text` is the JSON list of their log-likelihoods. `num_tokens` counts
    what was generated, the EOS or the stop string included. `finished` is False where the token
    limit came before both. `NO_ANSWER` stands where a model's logits, or its adapter's weights,
    are not finite.
    """

    text: str
    num_tokens: int
    finished: bool


# What is generated has one token at least, so that nothing else looks like this.
NO_ANSWER = Answer(text="", num_tokens=0, finished=False)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One raw answer and its verdict, kept so that scoring can be redone without a GPU.

    `text` and `finished` are those of the Answer; `finished` is None in answers of older versions,
    which did not say. `reason` is why it is not correct, in words, and may quote a program; None
    where it is correct or nothing is known.
    """

    question_index: int
    text: str
    num_tokens: int
    verdict: Literal["correct", "wrong", "truncated", "error"]
    finished: bool | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one task as they were asked, as far as judging answers needs them.

    Task, version and decoding identify it: the decoding holds a hash of all prompts and references.
    `references` and, where there are any, `choices` are those of the questions in their order;
    `extract` is the expression whose first group is judged of an answer, None: the whole.
    """

    task: str
    task_version: str
    decoding: str
    split: Literal["validation", "test"]
    references: tuple[str | None, ...]
    extract: str | None = None
    choices: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ToScore:
    """An adapter and a task that it is to be scored on. `kept`: its answers so far, by question.

    `adapter` need not be there any more where `kept` has all of them.
    """

    trial: Trial
    adapter: Path
    task: str
    kept: Mapping[int, Answer]


@dataclass(frozen=True, slots=True)
class Said:
    """Answers as they come, by question. `asked`: the index of what was asked, here and below."""

    asked: int
    answers: Mapping[int, Answer]


@dataclass(frozen=True, slots=True)
class Scored:
    """Every question has its answer, and every answer its verdict; in the questions' order."""

    asked: int
    score: Score
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class NotScored:
    """No score can be had now; `reason` in one line."""

    asked: int
    reason: str


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Which questions of one task a trial answered right: those of the score that counts.

    `questions` are the questions' indexes, ascending, `correct` belongs to them; an answer that was
    truncated or could not be graded is not correct.
    """

    trial_id: str
    task: str
    split: Literal["validation", "test"]
    questions: tuple[int, ...]
    correct: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """All that the store knows of one trial of one study; what analysis starts from.

    `outcome` is None for planned and running trials. `scores` are those of the study's choice.
    `purpose` "confirm": a fresh seed of what had been chosen; it must not take part in choosing.
    "adaptive": of a search that has no grid, so that no LR of it is an edge.
    """

    study: str
    select_on: Literal["validation_loss", "validation_accuracy", "test"]
    trial: Trial
    status: Status
    outcome: Outcome | None
    scores: tuple[Score, ...]
    engine: str | None
    purpose: Purpose = "search"


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """A study as it was stored: its name, the text of its file, and what selects."""

    name: str
    text: str
    select_on: Literal["validation_loss", "validation_accuracy", "test"]
    created_at: str


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """A score as it was stored. A trial may have many; `score_id` grows with time."""

    score_id: int
    trial_id: str
    score: Score
    created_at: datetime


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One try at a trial. `ended_at` and `end_kind` are None while it is open.

    "finished" has an outcome, "interrupted" was given back by its worker, "lost" was taken from a
    worker that was gone or had not been heard of.
    """

    attempt_id: int
    trial_id: str
    number: int
    provenance: Provenance
    started_at: datetime
    heartbeat_at: datetime
    ended_at: datetime | None
    end_kind: Literal["finished", "interrupted", "lost"] | None

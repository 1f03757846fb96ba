"""The study file as frozen pydantic models: every key that decides a result, and no other.

Unknown keys are errors. A key marked * in the documentation takes one value or a list of them;
lists are crossed by `plan`. What needs the model or the data to be judged (a rank above a layer's
width, a batch larger than the data) is judged by `plan`, not here.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from loratune.errors import StudyError
from loratune.records import MethodChoice, NoiseSchedule
from loratune.study.methods import choose

# Appendix E of the paper: {1, 2, 5} x 10^n from 1e-5 to 2e-3, and 3e-4 and 3e-3.
PAPER_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3)
# The task whose questions are the study's own held-out rows.
VALIDATION = "validation"
# Texts may be compressed, as data sets are often shipped.
LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
# Bounds against slips of the finger; what trains for longer is not a study of batch sizes.
MAX_SEEDS = MAX_EPOCHS = 1_000_000
MAX_STEPS = 1_000_000_000
# The largest integer of the store and of torch's generators.
MAX_SEED = 2**63 - 1


def _listed(value: Any) -> Any:
    """One value or a list of them, as a tuple."""
    return tuple(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else (value,)


def _no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    seen = set[Any]()
    for value in values:
        if value in seen:
            # A section as it was written, not as the class that it became.
            written = value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            raise ValueError(f"{written!r} is listed twice")
        seen.add(value)
    if not values:
        raise ValueError("the list is empty; give at least one value")
    return values


class Section(BaseModel):
    """A part of the study file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def source_of(value: Any) -> Any:
    """The short form of a source, a text, as the fields of a `Source`."""
    if not isinstance(value, str):
        return value
    if value.startswith("demo:"):
        return {"demo": value.removeprefix("demo:")}
    if value.endswith(LOCAL_SUFFIXES):
        return {"file": value}
    return {"id": value}


class Source(Section):
    """Where rows come from: a hub data set, a local file, or the demo task. Exactly one of them."""

    id: str | None = Field(
        default=None, min_length=1, description="hub id of a data set, such as openai/gsm8k"
    )
    subset: str | None = Field(default=None, description="configuration of the hub data set")
    split: str = Field(default="train", description="split of the hub data set")
    file: str | None = Field(
        default=None,
        description=".jsonl, .json or .csv, also with .gz, or .parquet; relative to the study",
    )
    demo: Literal["task"] | None = Field(default=None, description="the shipped synthetic task")

    @model_validator(mode="after")
    def _one_source(self) -> "Source":
        if sum(given is not None for given in (self.id, self.file, self.demo)) != 1:
            raise ValueError("give exactly one of id (a hub data set), file or demo")
        if self.id is None and self.subset is not None:
            raise ValueError("subset belongs to a hub data set (id), not to a file")
        return self


class Validation(Section):
    """The held-out rows that select: some of the training rows, or a file of their own."""

    rows: int | None = Field(default=None, gt=0, description="how many training rows to hold out")
    group_by: str | None = Field(
        default=None,
        description="field whose equal values stay on one side; left out: the normalised prompt",
    )
    file: Annotated[Source, BeforeValidator(source_of)] | None = Field(
        default=None,
        description="a file of validation rows; all rows of train are then training rows",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Validation":
        if (self.rows is None) == (self.file is None):
            raise ValueError("give either rows (held out from train) or file")
        if self.file is not None and self.group_by is not None:
            raise ValueError("group_by belongs to held-out rows, not to a file")
        return self


class Data(Section):
    """The rows, how they become text, and which of them train and validate."""

    train: Annotated[Source, BeforeValidator(source_of)] = Field(
        description="hub id, a .jsonl, .json, .csv or .parquet file, or demo:task"
    )
    prompt: str | None = Field(
        default=None, description="field of the prompt, or a template in braces"
    )
    response: str | None = Field(
        default=None, description="field of the response, or a template in braces"
    )
    messages: str | None = Field(
        default=None,
        description="field of a multi-turn chat; loss falls on the assistant's turns alone",
    )
    template: str = Field(
        default="plain",
        description="alpaca | chat (the tokenizer's own) | chatml | plain | a text with {prompt}",
    )
    suffix: str = Field(default="", description="text between the response and EOS")
    max_tokens: int = Field(gt=1, description="longest row, in tokens")
    too_long: Literal["drop", "truncate"] = Field(
        default="drop", description="what becomes of longer rows"
    )
    rows: Annotated[tuple[int | None, ...], BeforeValidator(_listed)] = Field(
        default=(None,), description="* N, training rows after the hold-out; left out: all"
    )
    rows_order: Literal["first", "random"] = Field(default="first", description="which N rows")
    validation: Validation | None = Field(default=None, description="the held-out rows")

    @field_validator("rows")
    @classmethod
    def _positive(cls, rows: tuple[int | None, ...]) -> tuple[int | None, ...]:
        for value in rows:
            if value is not None and value <= 0:
                raise ValueError(f"{value} rows; give a positive number")
        return _no_repeats(rows)

    @model_validator(mode="after")
    def _fields(self) -> "Data":
        if self.messages is None and (self.prompt is None or self.response is None):
            raise ValueError("give prompt and response, or messages")
        if self.messages is not None:
            if self.prompt is not None or self.response is not None:
                raise ValueError("give prompt and response, or messages, not both")
            if self.template not in ("chat", "chatml"):
                raise ValueError("messages needs template: chat or chatml")
        known = self.template in ("alpaca", "chat", "chatml", "plain")
        if not known and "{prompt}" not in self.template:
            raise ValueError(
                f"unknown template {self.template!r}; "
                "expected alpaca, chat, chatml, plain or a text that holds {prompt}"
            )
        return self


class Protocol(Section):
    """How long a trial trains: the same samples for every batch size, or the same updates."""

    kind: Literal["fixed_samples", "fixed_steps"]
    epochs: float | None = Field(
        default=None, gt=0, le=MAX_EPOCHS, description="passes over the rows (fixed_samples)"
    )
    steps: int | None = Field(default=None, gt=0, le=MAX_STEPS, description="updates (fixed_steps)")

    @field_validator("epochs", mode="before")
    @classmethod
    def _as_float(cls, value: Any) -> Any:
        return _as_float(value)

    @model_validator(mode="after")
    def _one_length(self) -> "Protocol":
        if self.kind == "fixed_samples" and (self.epochs is None or self.steps is not None):
            raise ValueError("fixed_samples takes epochs and no steps")
        if self.kind == "fixed_steps" and (self.steps is None or self.epochs is not None):
            raise ValueError("fixed_steps takes steps and no epochs")
        return self


def _as_float(value: Any) -> Any:
    """A whole number as a float; one that no float holds as infinity, which is then refused."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _method(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AlphaRule = Literal["rank", "2*rank"]


class MethodSpec(Section):
    """A LoRA variant by name, with options of its own: `lora` or `{name: loraplus, ratio: 16}`.

    `rank` and `alpha` here replace the study's for this method alone. Published comparisons need
    that: MiLoRA's gives LoRA alpha 128 but MiLoRA and PiSSA 64.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="the LoRA variant")
    rank: int | None = Field(default=None, ge=1, description="this method's r; left out: rank")
    alpha: AlphaRule | float | None = Field(
        default=None, description="this method's alpha; left out: the study's"
    )

    @field_validator("alpha", mode="before")
    @classmethod
    def _alpha(cls, value: Any) -> Any:
        return _as_float(value)

    @field_validator("alpha")
    @classmethod
    def _positive(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float) and value <= 0:
            raise ValueError(f"alpha {value:g}; give rank, 2*rank or a positive number")
        return value

    @model_validator(mode="after")
    def _known(self) -> "MethodSpec":
        self.choice()
        return self

    def choice(self) -> MethodChoice:
        """The method with every option filled in."""
        return choose(self.name, self.model_extra or {})


def _rates(value: Any) -> Any:
    if value is None:
        return None
    if value == "paper":
        return PAPER_LEARNING_RATES
    return tuple(_as_float(one) for one in _listed(value))


def _learning_rate(value: Any) -> Any:
    return cast("Any", value) if isinstance(value, dict) else {"values": value}


class LearningRate(Section):
    """The learning rates: a list, the paper's, or an adaptive search between two bounds.

    `{values: [...], extend: 3}`: where a cell's best LR is the lowest or the highest that was
    tried, up to three more are tried beyond it, one at a time, in the grid's own steps.

    `{search: adaptive, low: 1e-5, high: 1e-2}`: batch sizes and LRs are searched together, curve by
    curve, in rounds of `trials_per_round`, until the expected regret of the answer is below
    `margin`, a fraction of the validation loss, or a curve has `max_trials`. Trials that look
    hopeless stop half-way, unless `early_stopping: false`.
    """

    values: Annotated[tuple[float, ...] | None, BeforeValidator(_rates)] = None
    extend: int = Field(
        default=0, ge=0, description="so many LRs may be added beyond each end of the grid"
    )
    search: Literal["adaptive"] | None = None
    low: float | None = Field(default=None, gt=0)
    high: float | None = Field(default=None, gt=0)
    margin: float | None = Field(
        default=None, gt=0, lt=1, description="of an adaptive search; left out: 0.005"
    )
    max_trials: int | None = Field(
        default=None,
        ge=1,
        description="of an adaptive search, for each curve; left out: 3 a batch size and 5",
    )
    trials_per_round: int | None = Field(
        default=None, ge=1, description="of an adaptive search; left out: 6"
    )
    early_stopping: bool | None = Field(
        default=None,
        description="of an adaptive search: hopeless trials stop half-way; left out: true",
    )

    @property
    def stops_early(self) -> bool:
        """Whether trials that look hopeless are stopped half-way."""
        return self.search is not None and self.early_stopping is not False

    @field_validator("low", "high", "margin", mode="before")
    @classmethod
    def _floats(cls, value: Any) -> Any:
        return _as_float(value)

    @field_validator("values")
    @classmethod
    def _positive(cls, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        for value in values or ():
            if value <= 0:
                raise ValueError(f"learning rate {value:g}; give a positive number")
        return None if values is None else _no_repeats(values)

    @model_validator(mode="after")
    def _one_kind(self) -> "LearningRate":
        if (self.values is None) == (self.search is None):
            raise ValueError("give paper, a list of numbers, or {search: adaptive, low: , high: }")
        if self.search is not None:
            if self.low is None or self.high is None:
                raise ValueError("an adaptive search needs low and high")
            if self.low >= self.high:
                raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
            if self.extend:
                raise ValueError("extend belongs to a list of values, not to search: adaptive")
            return self
        of_search = (
            "low",
            "high",
            "margin",
            "max_trials",
            "trials_per_round",
            "early_stopping",
        )
        given = [name for name in of_search if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{' and '.join(given)} belong to search: adaptive")
        return self


def _beta2(value: Any) -> Any:
    return {"rule": value} if isinstance(value, str) else value


class Beta2(Section):
    """AdamW's second beta: fixed as in `betas`, or a half-life in trained target tokens."""

    rule: Literal["fixed"] | None = None
    half_life_tokens: float | None = Field(default=None, gt=0)

    @field_validator("half_life_tokens", mode="before")
    @classmethod
    def _half_life(cls, value: Any) -> Any:
        return _as_float(value)

    @model_validator(mode="after")
    def _one_rule(self) -> "Beta2":
        if (self.rule is None) == (self.half_life_tokens is None):
            raise ValueError("give fixed or {half_life_tokens: X}")
        return self


class Optimizer(Section):
    """AdamW and its numbers. The learning rate stands apart because it is what is searched."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="beta1 and, where fixed, beta2"
    )
    beta2: Annotated[
        tuple[Annotated[Beta2, BeforeValidator(_beta2)], ...], BeforeValidator(_listed)
    ] = Field(default=(Beta2(rule="fixed"),), description="* fixed | {half_life_tokens: X}")
    eps: float = Field(default=1e-8, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0, description="null: no clipping")

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(_as_float(one) for one in cast("Sequence[Any]", value))
        return value

    @field_validator("betas")
    @classmethod
    def _in_unit(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {betas}; give numbers from 0 up to, not including, 1")
        return betas

    @field_validator("eps", "weight_decay", "max_grad_norm", mode="before")
    @classmethod
    def _floats(cls, value: Any) -> Any:
        return _as_float(value)

    @field_validator("beta2")
    @classmethod
    def _distinct(cls, rules: tuple[Beta2, ...]) -> tuple[Beta2, ...]:
        return _no_repeats(rules)


class Schedule(Section):
    """The LR schedule; transformers' own formulas, update t of T uses the factor at t."""

    kind: Literal["cosine", "linear", "constant"]
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)

    @field_validator("warmup_ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> Any:
        return _as_float(value)

    @model_validator(mode="after")
    def _one_warmup(self) -> "Schedule":
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        return self


# How an answer is judged; `evaluation.graders` says what each of them does.
GraderName = Literal["pissa", "strict", "number", "exact", "plain", "normalised", "tests"]


def _task(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


# An empty one would be found at once, and every answer would be empty.
StopString = Annotated[str, Field(min_length=1)]


class Task(Section):
    """A test to score adapters on; what is left out is the task's own default."""

    name: str
    data: Annotated[Source, BeforeValidator(source_of)] | None = Field(
        default=None, description="the questions, where they are not the task's own hub data set"
    )
    prompt: str | None = Field(default=None, description="decoding prompt, a text with {prompt}")
    stop: Annotated[tuple[StopString, ...], BeforeValidator(_listed)] = Field(
        default=(), description="strings that end an answer"
    )
    max_new_tokens: int | None = Field(default=None, gt=0)
    grader: GraderName | None = Field(
        default=None, description="how answers are judged: pissa, strict, exact, plain, normalised"
    )
    questions: int | None = Field(
        default=None, gt=0, description="the first so many; left out: all"
    )


class Evaluate(Section):
    """Which tasks are scored, and for which trials."""

    tasks: Annotated[
        tuple[Annotated[Task, BeforeValidator(_task)], ...], BeforeValidator(_listed)
    ] = ()
    when: Literal["selected", "all"] = Field(
        default="selected", description="selected: each cell's chosen LR; all: every trial"
    )

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        names = [task.name for task in tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"task {name!r} is listed twice")
        return tasks


class NoiseScale(Section):
    """When gradients are looked at row by row, for the noise scale; see docs/noise-scale.md."""

    every: int = Field(
        default=10, gt=0, le=MAX_STEPS, description="one row of so many that train is looked at"
    )
    rows: int = Field(
        default=32, ge=2, le=4096, description="rows pooled where the batch has fewer than 8"
    )
    held_out: int | None = Field(
        default=None, ge=2, le=4096, description="validation rows to look at; left out: none"
    )

    def schedule(self) -> NoiseSchedule:
        """As the engines take it."""
        return NoiseSchedule(every=self.every, rows=self.rows, held_out_rows=self.held_out)


class DeclaredModel(Section):
    """A model's shape, so that `plan` works where the model cannot be reached."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    tied_embeddings: bool = False
    sliding_window: int | None = Field(default=None, gt=0)
    num_sliding_layers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "DeclaredModel":
        if self.num_sliding_layers > self.num_layers:
            raise ValueError(
                f"num_sliding_layers {self.num_sliding_layers} is above "
                f"num_layers {self.num_layers}"
            )
        return self


class DeclaredData(Section):
    """Row counts and mean lengths in tokens: `plan` works where the data cannot be reached."""

    rows: int = Field(gt=0, description="rows in the source, before the hold-out")
    mean_tokens: float = Field(gt=0, description="mean row length S of the cost formula")
    mean_target_tokens: float = Field(gt=0, description="mean tokens with loss a row")

    @field_validator("mean_tokens", "mean_target_tokens", mode="before")
    @classmethod
    def _floats(cls, value: Any) -> Any:
        return _as_float(value)

    @model_validator(mode="after")
    def _consistent(self) -> "DeclaredData":
        if self.mean_target_tokens > self.mean_tokens:
            raise ValueError(
                f"mean_target_tokens {self.mean_target_tokens:g} is above "
                f"mean_tokens {self.mean_tokens:g}"
            )
        return self


class Declared(Section):
    """Shapes and counts used by `plan` alone, and only where the real ones cannot be read."""

    models: dict[str, DeclaredModel] = Field(default_factory=dict[str, DeclaredModel])
    data: DeclaredData | None = None


def _counted_seeds(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{value} seeds; give at least 1, or a list of seeds")
        if value > MAX_SEEDS:
            raise ValueError(f"{value} seeds; give at most {MAX_SEEDS:,}, or a list of seeds")
        return tuple(range(value))
    return _listed(value)


def _seeds(value: Any) -> Any:
    return cast("Any", value) if isinstance(value, dict) else {"grid": value}


class Seeds(Section):
    """Which seeds are trained where: a count or a list for the whole grid, more where it matters.

    Seeds beyond the grid's are new numbers, counted on from the largest. `around_best` of them go
    to each cell's best LR and its two neighbours, and take part in choosing it. `confirm` of them
    go to the best cell of every curve, once it is chosen, and choose nothing: what they score is
    free of the luck that a best of many has.
    """

    grid: Annotated[tuple[int, ...], BeforeValidator(_counted_seeds)] = Field(
        description="a count (0, 1, 2, ...) or a list: the seeds of every trial of the grid"
    )
    around_best: int = Field(
        default=0, ge=0, le=MAX_SEEDS, description="further seeds at the best LR and beside it"
    )
    confirm: int = Field(
        default=0, ge=0, le=MAX_SEEDS, description="fresh seeds for the best cell of each curve"
    )

    @field_validator("grid")
    @classmethod
    def _whole_seeds(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        for value in values:
            if not 0 <= value <= MAX_SEED:
                raise ValueError(f"seed {value}; give whole numbers from 0 to 2**63 - 1")
        return _no_repeats(values)

    @model_validator(mode="after")
    def _room_for_more(self) -> "Seeds":
        if max(self.grid) + self.around_best + self.confirm > MAX_SEED:
            raise ValueError("further seeds are counted on from the largest; give smaller seeds")
        return self

    @property
    def further(self) -> tuple[int, ...]:
        """The seeds that are added around each cell's best LR."""
        first = max(self.grid) + 1
        return tuple(range(first, first + self.around_best))

    @property
    def num_compared(self) -> int:
        """How many seeds two chosen points are compared over: fresh ones where there are two."""
        return self.confirm if self.confirm > 1 else len(self.grid) + self.around_best

    @property
    def fresh(self) -> tuple[int, ...]:
        """The seeds that confirm the best cell of a curve."""
        first = max(self.grid) + 1 + self.around_best
        return tuple(range(first, first + self.confirm))


class Study(Section):
    """One study: the whole truth of what is run."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the study's name")
    model: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        description="* hub id, local folder, file.gguf, or demo:1m | demo:4m | demo:12m | demo:28m"
    )
    precision: Literal["bfloat16", "float16", "float32", "nf4", "int8"] = Field(
        description="of the frozen base (nf4 and int8 with bitsandbytes, int8 on a CUDA device); "
        "adapters and optimizer state are float32"
    )
    data: Data
    protocol: Annotated[tuple[Protocol, ...], BeforeValidator(_listed)] = Field(
        description="* {kind: fixed_samples, epochs: 1} or {kind: fixed_steps, steps: 200}"
    )
    methods: Annotated[
        tuple[Annotated[MethodSpec, BeforeValidator(_method)], ...], BeforeValidator(_listed)
    ] = Field(description="* LoRA variants: a name, or {name: loraplus, ratio: 16}")
    rank: Annotated[tuple[int, ...], BeforeValidator(_listed)] = Field(description="* r")
    alpha: Annotated[tuple[AlphaRule | float, ...], BeforeValidator(_listed)] = Field(
        description="* rank | 2*rank | a number"
    )
    targets: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        description="names of linear layers, or all-linear"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    batch_size: Annotated[tuple[int, ...], BeforeValidator(_listed)] = Field(
        description="* sequences per update of one adapter"
    )
    learning_rate: Annotated[LearningRate, BeforeValidator(_learning_rate)] = Field(
        description="* paper | [list] | {search: adaptive, low: 1e-5, high: 1e-2}"
    )
    seeds: Annotated[Seeds, BeforeValidator(_seeds)] = Field(
        description="a count (0, 1, 2, ...), a list, or {grid: 1, around_best: 2, confirm: 5}"
    )
    optimizer: Optimizer = Optimizer()
    schedule: Annotated[tuple[Schedule, ...], BeforeValidator(_listed)] = Field(
        description="* {kind: cosine | linear | constant, warmup_ratio or warmup_steps}"
    )
    evaluate: Evaluate = Evaluate()
    select_on: Literal["validation_loss", "validation_accuracy", "test"] = Field(
        default="validation_loss", description="what chooses the LR; test is for reproduction only"
    )
    keep_adapters: Literal["none", "best", "all"] = Field(
        default="best", description="none | best (one a cell) | all"
    )
    noise_scale: NoiseScale | None = Field(
        default=None, description="{every: 10, rows: 32, held_out: 64}; left out: not measured"
    )
    declared: Declared = Declared()

    @field_validator("dropout", mode="before")
    @classmethod
    def _float(cls, value: Any) -> Any:
        return _as_float(value)

    @field_validator("alpha", mode="before")
    @classmethod
    def _alphas(cls, value: Any) -> Any:
        return tuple(_as_float(one) for one in _listed(value))

    @field_validator("alpha")
    @classmethod
    def _positive_alpha(cls, values: tuple[str | float, ...]) -> tuple[str | float, ...]:
        for value in values:
            if isinstance(value, float) and value <= 0:
                raise ValueError(f"alpha {value:g}; give rank, 2*rank or a positive number")
        return _no_repeats(values)

    @field_validator("rank", "batch_size")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        for value in values:
            if value < 1:
                raise ValueError(f"{value}; give a whole number of at least 1")
        return _no_repeats(values)

    @field_validator("model", "targets")
    @classmethod
    def _named(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if "" in values:
            raise ValueError("an empty text; give a name")
        return values

    @field_validator("model", "protocol", "methods", "targets", "schedule")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _no_repeats(values)

    @model_validator(mode="after")
    def _possible(self) -> "Study":
        held_out = self.data.validation
        if self.learning_rate.search is not None:
            if self.select_on != "validation_loss":
                raise ValueError(
                    "learning_rate: {search: adaptive} searches the validation loss; remove "
                    f"select_on: {self.select_on}, or give a list of learning rates"
                )
            if self.seeds.around_best:
                raise ValueError(
                    "seeds: around_best belongs to a grid; an adaptive search gives further seeds "
                    "itself, up to those of seeds: grid"
                )
        if self.select_on == "test":
            if held_out is not None:
                raise ValueError(
                    "select_on: test holds nothing out; remove data.validation, "
                    "or select on validation_loss"
                )
            if not self.evaluate.tasks:
                raise ValueError("select_on: test needs a task in evaluate.tasks")
            if self.evaluate.when != "all":
                raise ValueError("select_on: test scores every trial; set evaluate.when: all")
        elif held_out is None:
            raise ValueError(
                f"select_on: {self.select_on} needs data.validation; "
                "add for example validation: {rows: 512}"
            )
        if self.noise_scale is not None:
            if self.noise_scale.held_out is not None and held_out is None:
                raise ValueError("noise_scale.held_out needs data.validation")
            if any(one.name == "adalora" for one in self.methods_chosen()):
                raise ValueError(
                    "noise_scale can't tell single rows' gradients of method adalora; leave "
                    "noise_scale or adalora out"
                )
        return self

    def methods_chosen(self) -> tuple[MethodChoice, ...]:
        """The methods with every option filled in."""
        return tuple(method.choice() for method in self.methods)

    def adapters(self) -> tuple[tuple[MethodChoice, int, float], ...]:
        """(method, rank, alpha as a number) of every adapter shape, methods x ranks x alphas.

        A method's own rank or alpha stands in the place of the study's list.
        """
        shapes = list[tuple[MethodChoice, int, float]]()
        for method in self.methods:
            ranks = self.rank if method.rank is None else (method.rank,)
            alphas = self.alpha if method.alpha is None else (method.alpha,)
            for rank, rule in product(ranks, alphas):
                factor = 2 if rule == "2*rank" else 1
                alpha = rule if isinstance(rule, float) else float(factor * rank)
                shapes.append((method.choice(), rank, alpha))
        return tuple(shapes)

    def scored_tasks(self) -> tuple[str, ...]:
        """Names of what adapters are scored on; VALIDATION first where it selects."""
        named = [task.name for task in self.evaluate.tasks]
        first = [VALIDATION] if self.select_on == "validation_accuracy" else []
        return tuple(dict.fromkeys([*first, *named]))

    def learning_rates(self) -> tuple[float, ...]:
        """The learning rates of the grid, ascending.

        Raises:
            StudyError: the study asks for an adaptive search, which has no grid.
        """
        if self.learning_rate.values is None:
            raise StudyError("learning_rate: {search: adaptive} has no grid of learning rates")
        return tuple(sorted(self.learning_rate.values))

"""The training wing of one study on one device: real models, real rows, real engines.

`survey` finds out what planning needs; `LocalWorkshop` also trains and scores. Bases are loaded
when a trial first needs one and stay until a trial of another model does.
"""

# datasets and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from loratune.data.prepare import PreparedData, prepare
from loratune.engine.base import Engine, Snapshot
from loratune.engine.packed import PackedEngine
from loratune.engine.packed_model import check_family
from loratune.engine.reference import ReferenceEngine
from loratune.engine.snapshot import load_snapshot, save_snapshot
from loratune.errors import CapacityError, DataError, LoratuneError, ModelError, StudyError
from loratune.evaluation.answering import Asked, answer_all
from loratune.evaluation.questions import Question, TaskQuestions
from loratune.evaluation.tasks import ask, ask_validation, check_tasks, load_questions
from loratune.methods import load_method
from loratune.methods.base import Packable
from loratune.models.demo import DEMO_MODELS, resolve_demo_model
from loratune.models.describe import describe_model
from loratune.models.load import (
    Base,
    Precision,
    check_precision,
    load_base,
    load_tokenizer,
    positions_of,
    read_config,
)
from loratune.models.sources import locate
from loratune.models.targets import block_linears
from loratune.planning.build import DEFAULT_TOKENS_PER_MICROBATCH, Plan, make_plan
from loratune.planning.cost import H100, Rate, tokens_that_fit
from loratune.planning.pack_shape import plan_pack
from loratune.planning.packing import NOT_PACKED, PackShape
from loratune.planning.shapes import declared_data_facts, declared_model_facts
from loratune.planning.trials import DataKey
from loratune.records import (
    DataFacts,
    DataSummary,
    ModelFacts,
    NotScored,
    Provenance,
    QuestionSet,
    Said,
    Scored,
    ScoreKey,
    ToScore,
    Trial,
)
from loratune.study.identity import cell_key
from loratune.study.loading import LoadedStudy
from loratune.study.schema import VALIDATION, Study

# Narrow models on a CPU gain nothing from larger micro-batches, and lose cache.
TOKENS_PER_MICROBATCH_ON_CPU = 4096
EngineChoice = Literal["auto", "packed", "reference"]
VERSIONED = ("loratune", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Survey:
    """What was found of a study's models and data.

    `tokenizers` are by model; `prepared` holds the rows where they could be read, by data
    fingerprint; `remarks` says in plain words what had to be taken from the study's declarations.
    """

    models: Mapping[str, ModelFacts]
    data: Mapping[DataKey, DataFacts]
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    prepared: Mapping[str, PreparedData]
    remarks: tuple[str, ...] = ()

    def summaries(self) -> dict[str, DataSummary]:
        """What became of the rows, by data fingerprint."""
        return {fingerprint: rows.summary for fingerprint, rows in self.prepared.items()}


def survey(
    loaded: LoadedStudy,
    *,
    download: bool,
    trust_remote_code: bool = False,
    test_questions: Mapping[str, tuple[str, ...]] | None = None,
) -> Survey:
    """Find out what planning needs of the study's models and data.

    Args:
        loaded: the study.
        download: True fetches from the hub what is not there, and fails where it can't; False
            fetches nothing and falls back on what the study declares.
        trust_remote_code: whether a model's own Python code may run.
        test_questions: each task's raw questions, to find training rows that stand in a test.

    Raises:
        ModelError, DataError: model or data can't be had, and nothing is declared in their place.
    """
    study = loaded.study
    models = dict[str, ModelFacts]()
    data = dict[DataKey, DataFacts]()
    tokenizers = dict[str, PreTrainedTokenizerBase]()
    prepared = dict[str, PreparedData]()
    remarks = list[str]()
    for name in study.model:
        source = model_source(name, folder=loaded.folder)
        try:
            facts = describe_model(source, download=download, trust_remote_code=trust_remote_code)
            tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        except ModelError as error:
            declared = study.declared.models.get(name)
            if download or declared is None:
                raise
            models[name] = declared_model_facts(name, declared)
            remarks.append(f"model {name}: planned from its declared shape ({error})")
            for rows in study.data.rows:
                data[name, rows] = _declared_rows(study, rows, error)
            continue
        models[name] = replace(facts, source=name)
        tokenizers[name] = tokenizer
        try:
            with nullcontext() if download or not _on_hub(study) else _cached_data_alone():
                source_rows = prepare(
                    study.data,
                    tokenizer=tokenizer,
                    folder=loaded.folder,
                    test_questions=test_questions,
                )
        except DataError as error:
            if download or study.declared.data is None:
                raise
            remarks.append(f"data: planned from the declared counts ({error})")
            for rows in study.data.rows:
                data[name, rows] = _declared_rows(study, rows, error)
            continue
        for rows in study.data.rows:
            chosen = source_rows.choose(rows)
            data[name, rows] = chosen.facts
            prepared[chosen.facts.fingerprint] = chosen
    return Survey(models, data, tokenizers, prepared, tuple(remarks))


def _on_hub(study: Study) -> bool:
    held_out = study.data.validation
    sources = (study.data.train, held_out.file if held_out is not None else None)
    return any(source is not None and source.id is not None for source in sources)


@contextmanager
def _cached_data_alone() -> Generator[None]:
    """Meanwhile `datasets` fetches nothing; it looks at this switch of its own at every call."""
    from datasets import config as datasets_config  # Slow, and needed for hub data alone.

    before = datasets_config.HF_HUB_OFFLINE
    datasets_config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets_config.HF_HUB_OFFLINE = before


def data_account(summary: DataSummary) -> str:
    """What became of the rows, in one line: what was dropped, cut or stands in a test is said."""
    parts = [f"{summary.num_train_rows:,} of {summary.num_source_rows:,} rows train"]
    if summary.num_validation_rows:
        parts.append(f"{summary.num_validation_rows:,} validate")
    counted = {
        "too long, dropped": summary.num_dropped_too_long,
        "too long, truncated": summary.num_truncated,
        "validation rows too long, dropped": summary.num_validation_dropped,
        "training rows ask what another one asks": summary.num_duplicate_rows,
        "training rows ask what a validation row asks": summary.num_in_validation,
    } | {f"training rows stand in the test of {task}": n for task, n in summary.num_in_test}
    parts += [f"{count:,} {what}" for what, count in counted.items() if count]
    return f"data {summary.source}: {'; '.join(parts)}"


def model_source(name: str, *, folder: Path) -> str:
    """A study's model name as something to load: a path is relative to the study file."""
    beside = folder / Path(name).expanduser()
    return str(beside) if not name.startswith("demo:") and beside.exists() else name


def _declared_rows(study: Study, rows: int | None, error: LoratuneError) -> DataFacts:
    if study.declared.data is None:
        raise DataError(
            "the rows can't be tokenised without the model, and the study declares no counts; "
            "add declared: {data: {rows: , mean_tokens: , mean_target_tokens: }}"
        ) from error
    return declared_data_facts(study.data, study.declared.data, rows=rows)


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the first CUDA device, or the CPU.

    Raises:
        CapacityError: no such device on this machine.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CapacityError(f"device {name!r} is unknown; give cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise CapacityError(f"device {name!r} is not here: {count} CUDA devices; give cpu")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise CapacityError(f"device {name!r} is not supported; give cpu, cuda or cuda:N")
    return device


def choose_devices(names: str | Sequence[str]) -> tuple[torch.device, ...]:
    """Several devices of this machine: `all` GPUs, or names, also as one text with commas.

    A name that stands twice is two processes on that device.

    Raises:
        CapacityError: no such device on this machine, or none is named.
    """
    if names == "all":
        count = torch.cuda.device_count()
        names = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    elif isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    if not names:
        raise CapacityError("no device is named; give all, or devices such as cuda:0,cuda:1")
    return tuple(choose_device(name) for name in names)


def measured_flops_per_second(
    name: str,
    *,
    device: torch.device,
    precision: Precision,
    folder: Path,
    num_tokens: int = 2048,
) -> float:
    """The rate at which a model's blocks run forward and backward on this device, as LoRA needs it.

    4 N FLOPs a token: no gradient of a weight. The best of three passes over random tokens, after
    one that is not counted.

    Raises:
        ModelError: the model can't be had.
    """
    base = load_base(model_source(name, folder=folder), precision=precision, device=device)
    config = base.model.config.get_text_config()
    length = min(256, config.max_position_embeddings)
    shape = (max(1, num_tokens // length), length)
    ids_BT = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    inputs = base.model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    linears = block_linears(base.model).values()
    # Not their tensors' own count: two weights in nf4 lie in one number.
    num_weights = sum(linear.in_features * linear.out_features for linear in linears)
    seconds = list[float]()
    for _ in range(4):
        began = time.perf_counter()
        base.model.base_model(inputs_embeds=inputs).last_hidden_state.float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 4 * num_weights * ids_BT.numel() / min(seconds[1:])


@dataclass
class LocalWorkshop:
    """Models, rows and engines for one study on one device.

    `engine_choice`: `packed` trains many trials at once and refuses a study with a method that it
    does not have; `reference` trains them one after another; `auto` packs what can be packed.
    `num_threads` is this process's share of a CPU that several train on; None: torch's own choice.
    `unsafe_exec`: see `sandbox.choose_isolation`.
    """

    loaded: LoadedStudy
    device: torch.device
    engine_choice: EngineChoice = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    rate: Rate = H100
    num_threads: int | None = None
    unsafe_exec: bool = False
    _base: Base | None = field(default=None, init=False)
    _asked: dict[tuple[str, str, str], TaskQuestions] = field(
        default_factory=dict[tuple[str, str, str], TaskQuestions], init=False
    )

    def __post_init__(self) -> None:
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)

    def plan(self) -> Plan:
        """See `training.Workshop`.

        Raises:
            LoratuneError: what the study asks for can't be had or can't be done.
        """
        self._refuse_what_cannot_be_packed()
        for name in self.loaded.study.model:
            check_precision(name, self.loaded.study.precision, device=self.device)
        plan = make_plan(
            self.loaded.study,
            models=self._survey.models,
            data=self._survey.data,
            rate=self.rate,
        )
        if self.engine_choice == "packed":
            for trial in {trial.model: trial for trial in plan.trials}.values():
                check_family(self._base_of(trial).model, targets=trial.targets)
        return plan

    def data_summaries(self) -> Mapping[str, DataSummary]:
        """See `training.Workshop`."""
        return self._survey.summaries()

    def remarks(self) -> tuple[str, ...]:
        """See `training.Workshop`."""
        rebuilt = tuple(
            f"{name}: a rebuild with other weights than the recorded ones; "
            "its numbers are not those of the documentation"
            for name in self.loaded.study.model
            if name in DEMO_MODELS and not resolve_demo_model(name).matches_recorded_hash
        )
        accounts = {data_account(summary): None for summary in self._survey.summaries().values()}
        return (*rebuilt, *accounts, *self._unpacked())

    def provenance(self, engine: str) -> Provenance:
        """See `training.Workshop`."""
        return Provenance(
            engine=engine,
            device=_device_name(self.device),
            versions=(("python", platform.python_version()), *_versions()),
            commit=_commit(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def groups(self, trials: Sequence[Trial]) -> tuple[tuple[Trial, ...], ...]:
        """See `training.Workshop`.

        What is packed shares base and targets. The reference engine gains nothing from many trials,
        so that a group of its is a cell: it can be scored, and its adapters dropped, before the
        next one.
        """
        groups = dict[tuple[object, ...], list[Trial]]()
        for trial in trials:
            packed = (trial.model, trial.precision, trial.targets)
            key = packed if self._is_packed(trial) else cell_key(trial)
            groups.setdefault((self._is_packed(trial), *key), []).append(trial)
        return tuple(tuple(group) for group in groups.values())

    def engine(
        self, group: Sequence[Trial], *, num_processes: int = 1, remark: Callable[[str], None]
    ) -> Engine:
        """See `training.Workshop`.

        Raises:
            ModelError: `packed` was asked for and the family computes something else when packed.
        """
        rows = self._survey.prepared
        base = self._base_of(group[0])
        asked = self.loaded.study.noise_scale
        noise = None if asked is None else asked.schedule()
        if self._is_packed(group[0]):
            rows = {trial.data_fingerprint: rows[trial.data_fingerprint] for trial in group}
            try:
                check_family(base.model, targets=group[0].targets)
            except ModelError as error:
                if self.engine_choice == "packed":
                    raise
                remark(f"{group[0].model} trains on the reference engine, one by one: {error}")
            else:
                return PackedEngine(
                    base,
                    rows,
                    shape=self._pack_shape(group, num_processes=num_processes),
                    targets=group[0].targets,
                    noise=noise,
                )
        return ReferenceEngine(
            base, rows, tokens_per_microbatch=self._tokens_per_microbatch, noise=noise
        )

    def asks(self, trial: Trial, *, task: str) -> ScoreKey:
        """See `training.Workshop`."""
        return self._asked[trial.model, trial.data_fingerprint, task].score_key()

    def questions(self, trial: Trial, *, task: str) -> QuestionSet:
        """See `training.Workshop`."""
        return self._asked[trial.model, trial.data_fingerprint, task].question_set()

    def score(
        self, wanted: Sequence[ToScore], *, remark: Callable[[str], None]
    ) -> Generator[Said | Scored | NotScored]:
        """See `training.Workshop`."""
        of_model = dict[str, list[int]]()
        for index, one in enumerate(wanted):
            of_model.setdefault(one.trial.model, []).append(index)
        for indices in of_model.values():
            asked = list[Asked]()
            for index in indices:
                one = wanted[index]
                key = one.trial.model, one.trial.data_fingerprint, one.task
                asked.append(Asked(one.adapter, self._asked[key], one.kept))
            answers = answer_all(
                self._base_of(wanted[indices[0]].trial),
                asked,
                engine=self.engine_choice,
                remark=remark,
                unsafe_exec=self.unsafe_exec,
            )
            with closing(answers):
                for event in answers:
                    yield replace(event, asked=indices[event.asked])

    def save_snapshot(self, path: Path, snapshot: Snapshot) -> None:
        """See `training.Workshop`."""
        save_snapshot(path, snapshot)

    def load_snapshot(self, path: Path) -> Snapshot | None:
        """See `training.Workshop`."""
        return load_snapshot(path)

    def _is_packed(self, trial: Trial) -> bool:
        return (
            self.engine_choice != "reference"
            and trial.precision not in NOT_PACKED
            and isinstance(load_method(trial.method.name), Packable)
        )

    def _unpackable(self) -> tuple[str, ...]:
        """The study's methods that can't be packed."""
        names = dict.fromkeys(method.name for method in self.loaded.study.methods)
        return tuple(name for name in names if not isinstance(load_method(name), Packable))

    def _unpacked(self) -> tuple[str, ...]:
        """A remark on what `auto` does not pack: the whole study, or some of its methods."""
        names, precision = self._unpackable(), self.loaded.study.precision
        if self.engine_choice != "auto":
            return ()
        if precision in NOT_PACKED:
            return (
                f"precision {precision}: trained one trial after another by the reference engine; "
                f"{NOT_PACKED[precision]}",
            )
        if not names:
            return ()
        return (
            f"{', '.join(names)}: trained one trial after another by the reference engine; "
            "the packed engine has no such method",
        )

    def _refuse_what_cannot_be_packed(self) -> None:
        if self.engine_choice != "packed":
            return
        names, precision = self._unpackable(), self.loaded.study.precision
        if names:
            raise StudyError(
                f"the packed engine can't train the method {', '.join(names)}; give --engine auto"
            )
        if precision in NOT_PACKED:
            raise StudyError(
                f"the packed engine can't train over a base in {precision}: "
                f"{NOT_PACKED[precision]}; give --engine auto"
            )

    @cached_property
    def _survey(self) -> Survey:
        check_tasks(
            self.loaded.study.evaluate.tasks,
            folder=self.loaded.folder,
            unsafe_exec=self.unsafe_exec,
        )
        questions = {
            task.name: load_questions(task, folder=self.loaded.folder)
            for task in self.loaded.study.evaluate.tasks
            if task.name != VALIDATION
        }
        found = survey(
            self.loaded,
            download=True,
            trust_remote_code=self.trust_remote_code,
            test_questions={
                name: tuple(question.text for question in asked)
                for name, asked in questions.items()
            },
        )
        self._asked = self._ask_all(found, questions)
        return found

    def _ask_all(
        self, found: Survey, questions: Mapping[str, tuple[Question, ...]]
    ) -> dict[tuple[str, str, str], TaskQuestions]:
        """Every task as it will be asked, by model, data and task: what can't be asked fails now.

        Scoring comes after hours of training; whatever is wrong with it must show before.
        """
        study = self.loaded.study
        given = {task.name: task for task in study.evaluate.tasks}
        asked = dict[tuple[str, str, str], TaskQuestions]()
        for (name, _), facts in found.data.items():
            rows, tokenizer = found.prepared[facts.fingerprint], found.tokenizers[name]
            location = locate(model_source(name, folder=self.loaded.folder))
            positions = positions_of(
                read_config(location, trust_remote_code=self.trust_remote_code)
            )
            for task in study.scored_tasks():
                one = (
                    ask_validation(
                        rows.validation_examples,
                        given=given.get(task),
                        data=study.data,
                        tokenizer=tokenizer,
                        end_ids=rows.end_ids,
                    )
                    if task == VALIDATION
                    else ask(
                        given[task],
                        questions[task],
                        data=study.data,
                        tokenizer=tokenizer,
                        folder=self.loaded.folder,
                        end_ids=rows.end_ids,
                    )
                )
                one.check_room(positions)
                asked[name, facts.fingerprint, task] = one
        return asked

    def _base_of(self, trial: Trial) -> Base:
        source = model_source(trial.model, folder=self.loaded.folder)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Kernels of our own start on the current device.
        if self._base is None or self._base.source != source:
            self._base = None  # The old base goes before the new one comes.
            self._base = load_base(
                source,
                precision=self.loaded.study.precision,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                gradient_checkpointing=self.gradient_checkpointing,
            )
            if self._base.fingerprint != trial.model_fingerprint:
                raise ModelError(
                    f"model {trial.model} changed on disk since the study was planned; run it again"
                )
        return self._base

    def _pack_shape(self, group: Sequence[Trial], *, num_processes: int) -> PackShape:
        """From the device's whole memory, not what is free now."""
        on_cuda = self.device.type == "cuda"
        total = torch.cuda.get_device_properties(self.device).total_memory if on_cuda else None
        row_sets = {(trial.model, trial.rows) for trial in group}
        return plan_pack(
            group,
            model=self._survey.models[group[0].model],
            data=[self._survey.data[key] for key in row_sets],
            num_processes=num_processes,
            memory_bytes=total,
            gradient_checkpointing=self.gradient_checkpointing,
            probed=self.loaded.study.noise_scale is not None,
        )

    def _tokens_per_microbatch(self, trial: Trial) -> int:
        """From the device's whole memory, not what is free now: the cut decides rounding."""
        if self.device.type != "cuda":
            return TOKENS_PER_MICROBATCH_ON_CPU
        facts = self._survey.models[trial.model]
        total = torch.cuda.get_device_properties(self.device).total_memory
        assert self._base is not None
        weights = sum(p.numel() * p.element_size() for p in self._base.model.parameters())
        return tokens_that_fit(
            total - weights,
            model=facts,
            trial=trial,
            max_row_tokens=self._survey.data[trial.model, trial.rows].max_row_tokens,
            most=DEFAULT_TOKENS_PER_MICROBATCH,
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in VERSIONED)


def _commit() -> str | None:
    """The commit of a checkout that loratune runs from; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    asked = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() if asked.returncode == 0 else None

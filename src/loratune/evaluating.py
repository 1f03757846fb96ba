"""`evaluate`: any adapter, model or results folder on any task, without a study.

What an adapter answered can be kept in a file, a line a question: the same call then goes on where
it was stopped, and another grader needs no model. Of a results folder the scores go into its store.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune.analyse.proportions import wilson
from loratune.data.prepare import turn_ends
from loratune.errors import EvaluationError, ModelError
from loratune.evaluation.answering import Asked, answer_all
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.tasks import ask, check_tasks, load_questions
from loratune.folder import ResultsFolder, open_results
from loratune.methods.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from loratune.methods.adapter_sources import locate_adapter
from loratune.methods.attach_files import attach_files
from loratune.models.load import Base, Precision, load_base, positions_of
from loratune.records import (
    Answer,
    NotScored,
    Said,
    Score,
    Scored,
    TrialResult,
)
from loratune.scoring import ANSWERS_AT_ONCE, known_answers, written
from loratune.store.database import Store
from loratune.study.loading import load_study
from loratune.study.schema import Data, Task
from loratune.workshop import EngineChoice, choose_device, model_source

# lm-evaluation-harness's and most papers' prompt for a model that was not trained on another one.
DEFAULT_PROMPT = "Question: {prompt}\nAnswer:"


class NotAllScoredError(EvaluationError):
    """Something could not be scored. `found` is what could."""

    def __init__(self, message: str, found: tuple["Evaluation", ...]) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One adapter's account on one task. `low` and `high`: Wilson's 95% interval, over questions.

    `adapter` is None for the model itself.
    """

    model: str
    adapter: str | None
    score: Score
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        """Flat, under the names of the results' columns."""
        one = self.score
        return {
            "model": self.model,
            "adapter": self.adapter,
            "task": one.task,
            "task_version": one.task_version,
            "grader": one.grader,
            "decoding": one.decoding,
            "accuracy": one.accuracy,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "correct": one.correct,
            "wrong": one.wrong,
            "truncated": one.truncated,
            "errors": one.errors,
            "total": one.total,
        }


def evaluate(
    source: str,
    *,
    tasks: Sequence[Task],
    model: str | None,
    prompt: str,
    precision: Precision,
    device: str | None,
    answers: Path | None,
    engine: EngineChoice,
    remark: Callable[[str], None],
    trust_remote_code: bool = False,
    unsafe_exec: bool = False,
) -> tuple[Evaluation, ...]:
    """Score an adapter, or a model, on tasks.

    Args:
        source: an adapter in PEFT's format, a folder or a hub id, or a model: hub id, folder,
            file.gguf or demo model.
        tasks: what to ask.
        model: the adapter's base; None: the one that its adapter_config.json names.
        prompt: a text with {prompt}, or alpaca, plain or chat, for tasks without one of their own.
        precision: of the base.
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        answers: a file that keeps the raw answers; gone on with where it is there.
        engine: see `answer_all`.
        remark: is told how adapters are asked, where that is not as was to be expected.
        trust_remote_code: let a model's own Python code run.
        unsafe_exec: see `sandbox.choose_isolation`.

    Raises:
        LoratuneError: no such adapter, model or task, or they do not fit together; nothing has been
            asked then.
        NotAllScoredError: some tasks have no score; it holds the others.
    """
    check_tasks(tasks, folder=Path.cwd(), unsafe_exec=unsafe_exec)
    data = _data_with(prompt)
    known = [] if answers is None else _read_answers(answers)
    adapter = _adapter_of(source)
    name = model or (source if adapter is None else _base_of(adapter))
    base = load_base(
        name,
        precision=precision,
        device=choose_device(device),
        trust_remote_code=trust_remote_code,
    )
    questions = [_ask(given, base, data, folder=Path.cwd()) for given in tasks]
    who = _fingerprint(base, adapter, precision)
    kept = [_Kept(answers, known, who=who, asked=one) for one in questions]
    asked = [
        Asked(adapter, one, of_one.answers) for one, of_one in zip(questions, kept, strict=True)
    ]
    scores = dict[int, Score]()
    failures = list[str]()
    waiting = dict[int, dict[int, Answer]]()

    def write() -> None:
        for index, said in waiting.items():
            kept[index].write(said)
        waiting.clear()

    events = answer_all(base, asked, engine=engine, remark=remark, unsafe_exec=unsafe_exec)
    try:
        with closing(events):
            for event in events:
                if isinstance(event, Said):
                    waiting.setdefault(event.asked, {}).update(event.answers)
                elif isinstance(event, Scored):
                    scores[event.asked] = event.score
                else:
                    task = questions[event.asked].task
                    failures.append(f"{source} can't be scored on {task}: {event.reason}")
                if sum(map(len, waiting.values())) >= ANSWERS_AT_ONCE:
                    write()
    finally:
        write()
    who_answers = None if adapter is None else source
    found = tuple(_evaluation(name, who_answers, scores[index]) for index in sorted(scores))
    _check_all_scored(failures, found)
    return found


def evaluate_results(
    folder: str,
    *,
    tasks: Sequence[Task],
    device: str | None,
    engine: EngineChoice,
    remark: Callable[[str], None],
    trust_remote_code: bool = False,
    unsafe_exec: bool = False,
) -> tuple[Evaluation, ...]:
    """Score every adapter that a results folder keeps, with the study's own prompts.

    Many adapters answer at once. Scores and raw answers go into the folder's store; what is there
    already is not asked again, and another grader judges the answers that an earlier score keeps.

    Raises:
        LoratuneError: no adapter is kept, no such task, or the base cannot be had.
        NotAllScoredError: an adapter can't be scored; the scores of all others are in the store.
    """
    place, store, record = open_results(folder)
    with store:
        study = load_study(place.study).study
        results = store.results(record.name, with_losses=False, every_score=True)
        kept = [one for one in results if place.adapter(one.trial.trial_id).is_dir()]
        if not kept:
            raise EvaluationError(
                f"{folder} keeps no adapter; set keep_adapters: best in the study and run it"
            )
        check_tasks(tasks, folder=place.root, unsafe_exec=unsafe_exec)
        found = list[Evaluation]()
        failures = list[str]()
        for model, of_model in groupby(kept, key=lambda one: one.trial.model):
            source = model_source(model, folder=place.root)
            base = load_base(
                source,
                precision=study.precision,
                device=choose_device(device),
                trust_remote_code=trust_remote_code,
            )
            questions = [_ask(given, base, study.data, folder=place.root) for given in tasks]
            results_of_model = list(of_model)
            scores, unscored = _score_results(
                base,
                results_of_model,
                questions,
                study=record.name,
                place=place,
                store=store,
                engine=engine,
                remark=remark,
                unsafe_exec=unsafe_exec,
            )
            found += [
                _evaluation(model, str(place.adapter(one.trial.trial_id)), scores[index, number])
                for index, one in enumerate(results_of_model)
                for number in range(len(questions))
                if (index, number) in scores
            ]
            failures += unscored
        _check_all_scored(failures, tuple(found))
        return tuple(found)


def _check_all_scored(failures: Sequence[str], found: tuple[Evaluation, ...]) -> None:
    if failures:
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise NotAllScoredError(f"{failures[0]}{others}", found)


def _score_results(
    base: Base,
    results: Sequence[TrialResult],
    questions: Sequence[TaskQuestions],
    *,
    study: str,
    place: ResultsFolder,
    store: Store,
    engine: EngineChoice,
    remark: Callable[[str], None],
    unsafe_exec: bool,
) -> tuple[dict[tuple[int, int], Score], list[str]]:
    """Every trial's score on every task, by their indices, and why there is none.

    Those that are missing are made, and are in the store then.
    """
    scores = dict[tuple[int, int], Score]()
    wanted = list[tuple[int, int]]()
    # Once for all trials: both hash every prompt.
    keys, sets = zip(*((one.score_key(), one.question_set()) for one in questions), strict=True)
    for index, result in enumerate(results):
        known = {score.key: score for score in result.scores}
        for number, key in enumerate(keys):
            if key in known:
                scores[index, number] = known[key]
            else:
                wanted.append((index, number))
    of_trial = [(results[index].trial.trial_id, sets[number]) for index, number in wanted]
    kept = known_answers(store, study, of_trial)
    asked = [
        Asked(place.adapter(results[index].trial.trial_id), questions[number], known)
        for (index, number), known in zip(wanted, kept, strict=True)
    ]
    answers = answer_all(base, asked, engine=engine, remark=remark, unsafe_exec=unsafe_exec)
    failures = list[str]()
    with closing(written(answers, of_trial, store=store)) as events:
        for event in events:
            if isinstance(event, Scored):
                scores[wanted[event.asked]] = event.score
            elif isinstance(event, NotScored):
                index, number = wanted[event.asked]
                failures.append(
                    f"{results[index].trial.trial_id} can't be scored on {questions[number].task}: "
                    f"{event.reason}"
                )
    return scores, failures


def evaluate_by_harness(
    source: str,
    *,
    tasks: Sequence[str],
    model: str | None,
    precision: Precision,
    device: str | None,
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    chat: bool,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """lm-evaluation-harness's own results of its tasks, asked of an adapter or a model.

    Raises:
        LoratuneError: the harness is not installed, no such adapter, model or task, one that is not
            answered greedily, or logits that are not finite.
    """
    try:
        from loratune.evaluation.harness import manager_of, run_harness
    except ImportError as error:
        raise EvaluationError(
            f"lm-evaluation-harness is not installed ({error}); install it with "
            "pip install 'loratune[harness]'"
        ) from error
    adapter = _adapter_of(source)
    name = model or (source if adapter is None else _base_of(adapter))
    manager = manager_of(tasks, include_path=include_path)  # Before the base is loaded.
    with _attached(name, adapter, precision, device, trust_remote_code) as base:
        return run_harness(
            base,
            tasks,
            manager=manager,
            adapter=None if adapter is None else source,
            num_fewshot=num_fewshot,
            limit=limit,
            chat=chat,
        )


def is_results_folder(source: str) -> bool:
    """Whether `loratune run` wrote it."""
    return ResultsFolder(Path(source).expanduser()).study.is_file()


def _adapter_of(source: str) -> Path | None:
    """The folder, where it is an adapter's; None for a model.

    Raises:
        EvaluationError: it is a results folder.
        ModelError: as `locate_adapter` says.
    """
    if is_results_folder(source):
        raise EvaluationError(
            f"{source} is a results folder; give one of its adapters, such as "
            f"{Path(source).expanduser() / 'adapters' / 'trial-...'}"
        )
    return locate_adapter(source)


@contextmanager
def _attached(
    model: str,
    adapter: Path | None,
    precision: Precision,
    device: str | None,
    trust_remote_code: bool,
) -> Generator[Base]:
    """The base, with the adapter on it meanwhile."""
    base = load_base(
        model,
        precision=precision,
        device=choose_device(device),
        trust_remote_code=trust_remote_code,
    )
    attached = None if adapter is None else attach_files(base.model, adapter)
    try:
        yield base
    finally:
        if attached is not None:
            attached.detach()


def _evaluation(model: str, adapter: str | None, score: Score) -> Evaluation:
    low, high = wilson(score.correct, score.total)
    return Evaluation(model, adapter, score, low, high)


def _base_of(adapter: Path) -> str:
    """The base that an adapter's configuration names.

    Raises:
        ModelError: it names none.
    """
    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        name = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapter}: adapter_config.json names no base; give --model") from error
    if not isinstance(name, str) or not name:
        raise ModelError(f"{adapter}: adapter_config.json names no base; give --model")
    return name


def _ask(given: Task, base: Base, data: Data, *, folder: Path) -> TaskQuestions:
    """A task as a study with this data section would ask it, if the model has room for it."""
    asked = ask(
        given,
        load_questions(given, folder=folder),
        data=data,
        tokenizer=base.tokenizer,
        folder=folder,
        end_ids=turn_ends(data, tokenizer=base.tokenizer),
    )
    asked.check_room(positions_of(base.model.config))
    return asked


def _data_with(prompt: str) -> Data:
    """A data section that is nothing but a template: nothing is trained, but it needs the rest.

    Raises:
        EvaluationError: it is no template.
    """
    try:
        return Data.model_validate(
            {
                "train": {"demo": "task"},
                "prompt": "question",
                "response": "answer",
                "template": prompt,
                "max_tokens": 2,
            }
        )
    except ValidationError as error:
        raise EvaluationError(
            f"prompt {prompt!r}: expected a text with {{prompt}}, where the question goes, or "
            "alpaca, plain or chat"
        ) from error


def _fingerprint(base: Base, adapter: Path | None, precision: Precision) -> str:
    """Who answers: a hash of all that its answers come from, wherever the files lie."""
    parts = [base.fingerprint, precision]
    if adapter is not None:
        files = [path for name in (CONFIG_NAME, WEIGHTS_NAME) if (path := adapter / name).is_file()]
        parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


# What every line of a file of answers begins with, and so the one that was being written when the
# process was killed.
_BEGINNING = b'{"who": '


def _read_answers(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file of answers; afterwards it is there, and lines can be added to it.

    Raises:
        EvaluationError: it holds anything else, or cannot be written.
    """
    foreign = "no answer of `loratune evaluate`; give another file for --answers"
    found = list[dict[str, Any]]()
    try:
        with path.open("a+b") as file:
            file.seek(0)
            # Line by line in bytes: one that is no UTF-8 is no answer of ours.
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
                        raise EvaluationError(f"{path}, line {number}: {foreign}")
                    file.truncate(file.tell() - len(line))
                    break
                try:
                    one = json.loads(line)
                    Answer(one["text"], one["num_tokens"], one["finished"])
                    int(one["question_index"])
                except (ValueError, KeyError, TypeError) as error:
                    raise EvaluationError(f"{path}, line {number}: {foreign}") from error
                found.append(one)
    except OSError as error:
        raise EvaluationError(
            f"answers cannot be kept in {path}: {error.strerror}; give --answers a file in a "
            "folder that is there"
        ) from error
    return found


class _Kept:
    """The answers of one adapter to one task in a file of many, a JSON object a line.

    `answers`: those that were in it at the beginning, by question.
    """

    def __init__(
        self,
        path: Path | None,
        known: Sequence[Mapping[str, Any]],
        *,
        who: str,
        asked: TaskQuestions,
    ) -> None:
        """`known`: what `_read_answers` found in the file."""
        self._path = path
        self._key = {
            "who": who,
            "task": asked.task,
            "task_version": asked.version,
            "decoding": asked.decoding,
        }
        self.answers = {
            int(one["question_index"]): Answer(one["text"], one["num_tokens"], one["finished"])
            for one in known
            if {name: one.get(name) for name in self._key} == self._key
        }

    def write(self, answers: Mapping[int, Answer]) -> None:
        """Add answers, by question, to the file."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for index, answer in answers.items():
                line = {
                    **self._key,
                    "question_index": index,
                    "num_tokens": answer.num_tokens,
                    "finished": answer.finished,
                    "text": answer.text,
                }
                file.write(json.dumps(line) + "\n")

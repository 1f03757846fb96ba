"""The tasks by name, and a study's task made ready to ask.

A new task is a new file with a `TASK` and a line in `_TASKS`, or a user's own YAML file. Which
adapter answers, and how, is not known here; nor is torch.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loratune.data.encode import encode_prompts
from loratune.data.templates import fields_of, prompt_for
from loratune.errors import DataError, EvaluationError, MissingDataError
from loratune.evaluation import (
    arithmetic,
    choice,
    demo,
    gsm8k,
    humaneval,
    mbpp,
    validation,
)
from loratune.evaluation.custom import is_custom, read_task
from loratune.evaluation.graders import CHOICE_GRADERS
from loratune.evaluation.questions import Question, TaskDefinition, TaskQuestions
from loratune.evaluation.sandbox import choose_isolation
from loratune.study import schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loratune.data.prepare import Example

_TASKS = {
    one.name: one
    for one in (
        gsm8k.TASK,
        arithmetic.SVAMP,
        arithmetic.MULTIARITH,
        arithmetic.ADDSUB,
        arithmetic.SINGLEEQ,
        humaneval.TASK,
        mbpp.TASK,
        choice.ARC_EASY,
        choice.ARC_CHALLENGE,
        choice.BOOLQ,
        choice.OPENBOOKQA,
        choice.PIQA,
        demo.TASK,
        validation.TASK,
    )
}


def can_score(name: str) -> bool:
    """Whether this version can score the task `name`, a file of the user's own left aside."""
    return name in _TASKS


def task(name: str, *, folder: Path = Path()) -> TaskDefinition:
    """The task `name`, or that of a YAML file; `folder` is what its path is relative to.

    Raises:
        EvaluationError: there is no such task, or the file is none.
    """
    if name in _TASKS:
        return _TASKS[name]
    if is_custom(name):
        definition = read_task(folder / Path(name).expanduser())
        if definition.name in _TASKS:
            raise EvaluationError(
                f"task file {name} calls itself {definition.name!r}, which is a task of "
                "loratune's; give it another name, as scores are told apart by it"
            )
        return definition
    near = difflib.get_close_matches(name, [*_TASKS], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise EvaluationError(
        f"task {name!r} is unknown; choose one of {', '.join(_TASKS)}, or the path of a .yaml "
        f"file{hint}"
    )


def check_tasks(
    tasks: Sequence[schema.Task], *, folder: Path = Path(), unsafe_exec: bool = False
) -> None:
    """Refuse, before anything is trained or read, what could not be scored afterwards.

    Args:
        tasks: the study's.
        folder: what relative paths start at, the study file's folder.
        unsafe_exec: see `sandbox.choose_isolation`.

    Raises:
        EvaluationError: a task is unknown, was given data or a grader that it has no use for, has
            a prompt without {prompt}, shares its name with another, or needs a sandbox that this
            machine does not offer.
    """
    files = dict[str, str]()
    for given in tasks:
        definition = task(given.name, folder=folder)
        if definition.name in files:
            raise EvaluationError(
                f"{files[definition.name]} and {given.name} are both called {definition.name!r}; "
                "give each task a name of its own, as scores are told apart by it"
            )
        files[definition.name] = given.name
        if given.data is not None and not definition.takes_data:
            raise EvaluationError(f"task {given.name} has questions of its own; remove its `data:`")
        if definition.grader == "tests":
            choose_isolation(unsafe_exec=unsafe_exec)
        if given.grader is not None and given.grader not in alike(definition.grader):
            raise EvaluationError(
                f"task {given.name} is not judged by grader {given.grader}; choose "
                f"{' or '.join(alike(definition.grader))}"
            )
        if given.prompt is not None:
            _check_prompt(given.prompt, task=given.name)


def check_questions(
    tasks: Sequence[schema.Task], *, folder: Path, may_be_missing: bool
) -> tuple[str, ...]:
    """Read the questions that need no network, so that a plan refuses what a run would.

    Args:
        tasks: the study's.
        folder: what relative paths start at, the study file's folder.
        may_be_missing: a file that is not on this machine is a remark, not an error.

    Returns:
        A remark for each task whose questions are not here.

    Raises:
        EvaluationError: as `load_questions` says.
    """
    remarks = list[str]()
    for given in tasks:
        definition = task(given.name, folder=folder)
        on_hub = definition.on_hub if given.data is None else given.data.id is not None
        if definition.load is None or on_hub:
            continue
        try:
            load_questions(given, folder=folder)
        except EvaluationError as error:
            if not may_be_missing or not isinstance(error.__cause__, MissingDataError):
                raise
            remarks.append(f"task {given.name}: planned without its questions ({error.__cause__})")
    return tuple(remarks)


def alike(grader: str) -> tuple[str, ...]:
    """The graders that can judge the same answers."""
    for kinds in (CHOICE_GRADERS, ("strict", "pissa")):
        if grader in kinds:
            return kinds
    return (grader,)


def load_questions(given: schema.Task, *, folder: Path) -> tuple[Question, ...]:
    """The questions of a test task, the first `questions` of them where the study says so.

    Args:
        given: the study's choice.
        folder: what relative paths start at, the study file's folder.

    Raises:
        EvaluationError: as `task` says, the questions cannot be had, or there are fewer of them.
    """
    definition = task(given.name, folder=folder)
    if definition.load is None:
        raise EvaluationError(f"task {given.name} has no questions but the study's held-out rows")
    return _first(definition.load(given.data, folder), given=given)


def ask(
    given: schema.Task,
    questions: Sequence[Question],
    *,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path = Path(),
    end_ids: Sequence[int] = (),
) -> TaskQuestions:
    """A test task with the study's template around every question, or the task's own prompt.

    Args:
        given: the study's choice.
        questions: what `load_questions` gave.
        folder: what relative paths start at.
        data: the study's section, for its prompt and template.
        tokenizer: the base model's.
        end_ids: `PreparedData.end_ids`, where there is one.

    Raises:
        EvaluationError: as `task` says, or the task's own prompt has no {prompt}.
        DataError: the study's prompt is made of several fields; the task needs its own.
    """
    definition = task(given.name, folder=folder)
    if given.prompt is None and definition.prompt is not None:
        given = given.model_copy(update={"prompt": definition.prompt})
    prompts = _prompts(
        [question.text for question in questions], given=given, data=data, tokenizer=tokenizer
    )
    has_choices = definition.grader in CHOICE_GRADERS
    assert has_choices or definition.max_new_tokens is not None, definition.name
    template = data.template if given.prompt is None else given.prompt
    choice_ids: tuple[tuple[tuple[int, ...], ...], ...] = ()
    if has_choices:
        prompt_ids, choice_ids = _choice_ids(
            prompts, questions, tokenizer=tokenizer, template=template, task=definition.name
        )
    else:
        prompt_ids = _tokens(prompts, tokenizer=tokenizer, template=template)
    longest = max((len(ids) for of_one in choice_ids for ids in of_one), default=0)
    return TaskQuestions(
        task=definition.name,
        version=definition.version,
        split=definition.split,
        grader=given.grader or definition.grader,
        prompts=prompts,
        prompt_ids=prompt_ids,
        references=tuple(question.reference for question in questions),
        max_new_tokens=given.max_new_tokens or definition.max_new_tokens or longest,
        stop=given.stop or definition.stop,
        end_ids=tuple(end_ids),
        extract=definition.extract,
        choices=tuple(question.choices for question in questions) if has_choices else (),
        choice_ids=choice_ids,
    )


def _choice_ids(
    prompts: Sequence[str],
    questions: Sequence[Question],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    task: str,
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[tuple[int, ...], ...], ...]]:
    """Each prompt's tokens, and those of each of its choices after it.

    As in lm-evaluation-harness (`TemplateLM._encode_pair`): white space at the end of a prompt goes
    to the choice, where there is none a space does; the whole is tokenised, and as many tokens as
    the prompt alone has are counted off. A tokenizer may join a choice's first letters to the space
    before them, so that a prompt that kept it would take them away from the choice.

    Raises:
        EvaluationError: a prompt is empty, or nothing of a choice is left.
    """
    stems = [prompt.rstrip() for prompt in prompts]
    wholes = [
        f"{prompt}{'' if prompt[-1:].isspace() else ' '}{text}"
        for prompt, question in zip(prompts, questions, strict=True)
        for text in question.choices
    ]
    prompt_ids = _tokens(stems, tokenizer=tokenizer, template=template)
    encoded = iter(encode_prompts(wholes, tokenizer=tokenizer, template=template))
    choice_ids = list[tuple[tuple[int, ...], ...]]()
    for number, (ids, question) in enumerate(zip(prompt_ids, questions, strict=True), start=1):
        if not ids:
            raise EvaluationError(
                f"task {task}, question {number}: its prompt is empty, and a choice has to follow "
                "something; give the task a prompt"
            )
        of_one = tuple(tuple(next(encoded)[len(ids) :]) for _ in question.choices)
        for text, tokens in zip(question.choices, of_one, strict=True):
            if not text.strip() or not tokens:
                raise EvaluationError(
                    f"task {task}, question {number}: the choice {text!r} has no text of its own, "
                    "so that it has no likelihood; give each choice a text"
                )
        choice_ids.append(of_one)
    return prompt_ids, tuple(choice_ids)


def ask_validation(
    examples: Sequence["Example"],
    *,
    given: schema.Task | None = None,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
    end_ids: Sequence[int] = (),
) -> TaskQuestions:
    """The study's held-out rows as a task, their prompts as in training.

    Args:
        examples: the held-out rows, in their order.
        given: the study's settings where evaluate.tasks names `validation`.
        data: the study's section; only a prompt of the task's own needs it.
        tokenizer: the base model's; the default token limit counts references with it.
        end_ids: `PreparedData.end_ids`.

    Raises:
        EvaluationError: there are no rows, fewer than asked for, the grader can read none of their
            responses, or the task's own prompt has no {prompt}.
    """
    given = schema.Task(name=validation.TASK.name) if given is None else given
    definition = validation.TASK
    examples = _first(tuple(examples), given=given)
    grader = given.grader or definition.grader
    responses = [example.response_text for example in examples]
    references = validation.references(responses, grader=grader)
    prompts = tuple(example.prompt_text for example in examples)
    prompt_ids = tuple(example.prompt_ids for example in examples)
    if given.prompt is not None:
        prompts = _prompts(
            [example.question for example in examples], given=given, data=data, tokenizer=tokenizer
        )
        prompt_ids = _tokens(prompts, tokenizer=tokenizer, template=given.prompt)
    response_ids = encode_prompts(responses, tokenizer=tokenizer, template="plain")
    return TaskQuestions(
        task=definition.name,
        version=definition.version,
        split=definition.split,
        grader=grader,
        prompts=prompts,
        prompt_ids=prompt_ids,
        references=references,
        max_new_tokens=given.max_new_tokens or validation.room_for([len(i) for i in response_ids]),
        stop=given.stop or definition.stop,
        end_ids=tuple(end_ids),
    )


def _prompts(
    questions: Sequence[str],
    *,
    given: schema.Task,
    data: schema.Data,
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[str, ...]:
    """Complete prompts."""
    if given.prompt is not None:
        _check_prompt(given.prompt, task=given.name)
    return tuple(
        prompt_for(question, data, tokenizer=tokenizer, template=given.prompt)
        for question in questions
    )


def _tokens(
    prompts: Sequence[str], *, tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[tuple[int, ...], ...]:
    """The prompts' tokens."""
    return tuple(map(tuple, encode_prompts(prompts, tokenizer=tokenizer, template=template)))


def _check_prompt(prompt: str, *, task: str) -> None:
    """Raise EvaluationError unless {prompt} is the only field of the text."""
    try:
        fields = set(fields_of(prompt)) if "{" in prompt else set[str]()
    except DataError as error:
        raise EvaluationError(f"task {task}: prompt: {error}") from error
    if fields != {"prompt"}:
        raise EvaluationError(
            f"task {task}: prompt {prompt!r} should hold {{prompt}}, where the question goes, "
            "and no other field"
        )


_Item = TypeVar("_Item", Question, "Example")


def _first(items: tuple[_Item, ...], *, given: schema.Task) -> tuple[_Item, ...]:
    if given.questions is not None and given.questions > len(items):
        raise EvaluationError(
            f"task {given.name}: questions={given.questions}, but there are {len(items)}; "
            f"choose at most {len(items)}, or leave it out for all"
        )
    return items[: given.questions]

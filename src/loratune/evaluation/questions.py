"""What a task is, what a question is, and what is asked in the end. Values only.

A question as its task knows it is a `Question`: no template, no decoding. With the study's template
around it and every setting of the decoding filled in it becomes a part of `TaskQuestions`, which
scoring takes as it is. Nothing here knows where questions come from or who answers them.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loratune.errors import EvaluationError
from loratune.records import QuestionSet, ScoreKey
from loratune.study.schema import GraderName, Source


@dataclass(frozen=True, slots=True)
class Question:
    """`text` is what stands in the prompt's field. `reference` is the right answer as a text.

    For graders of numbers it is the right number, and None where none could be read: answers then
    count as errors. Where there are `choices`, the model is not asked to write but how likely it
    finds each of them after the prompt; `reference` is the number of the right one, from 0.
    """

    text: str
    reference: str | None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskDefinition:
    """A task that can be scored, and what holds where a study says nothing else.

    `version` changes with everything that can change a score and is not in `Score.decoding`: the
    graders, the reading of references, the order of the questions. `load(source, folder)` gives the
    questions, of the task's own data where source is None; it is None itself where the questions
    are the study's own held-out rows. `max_new_tokens` is None where they depend on those, and
    where nothing is written. `extract` is a regular expression whose first group is what is judged
    of an answer; None: the whole of it. `prompt` stands in the place of the study's own.
    `takes_data`: `data:` may name questions in the place of the task's own. `on_hub`: those of its
    own are a data set of the hub.
    """

    name: str
    version: str
    split: Literal["validation", "test"]
    grader: GraderName
    max_new_tokens: int | None
    stop: tuple[str, ...]
    load: Callable[[Source | None, Path], tuple[Question, ...]] | None
    takes_data: bool = False
    on_hub: bool = True
    extract: str | None = None
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class TaskQuestions:
    """One task as one study asks it: complete prompts, references, and every decoding setting.

    `prompt_ids[i]`, the tokens of `prompts[i]` as a training row begins with them, and
    `references[i]` belong together. `end_ids` are tokens that end an answer beside those that
    tokenizer and model name: what the study's chat template ends a turn with. `choices[i]` and
    `choice_ids[i]`, their tokens after the prompt, are there for all questions or for none.
    """

    task: str
    version: str
    split: Literal["validation", "test"]
    grader: GraderName
    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    references: tuple[str | None, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    end_ids: tuple[int, ...] = ()
    extract: str | None = None
    choices: tuple[tuple[str, ...], ...] = ()
    choice_ids: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def decoding(self) -> str:
        """`Score.decoding`: a short text, the same for the same prompts decoded the same way.

        The hash is over all prompts and references, so that another template, other data or fewer
        questions are another decoding, and their scores other rows.
        """
        asked = json.dumps([*zip(self.prompts, self.references, strict=True), *self.choices])
        digest = hashlib.sha256(asked.encode("ascii")).hexdigest()[:16]
        if self.choices:
            return f"log-likelihood;questions={len(self.prompts)};prompt=sha256:{digest}"
        return (
            f"greedy;max_new_tokens={self.max_new_tokens};stop={json.dumps(self.stop)};"
            f"questions={len(self.prompts)};prompt=sha256:{digest}"
        )

    def score_key(self) -> ScoreKey:
        """The key of the scores that these questions give; it hashes all of them."""
        return ScoreKey(self.task, self.version, self.grader, self.decoding)

    def check_room(self, positions: int | None) -> None:
        """Make sure, before anything is asked, that all can be: prompts, and what comes after.

        Args:
            positions: the model's; None: no limit is known.

        Raises:
            EvaluationError: a prompt without a token, or one too long with its longest answer or
                choice; it names task and question.
        """
        for number, ids in enumerate(self.prompt_ids, start=1):
            where = f"task {self.task}, question {number}"
            if not ids:
                raise EvaluationError(
                    f"{where}: the prompt has no token, and an answer has to start from one; give "
                    "the task a prompt that is not empty"
                )
            if positions is None:
                continue
            choices = self.choice_ids[number - 1] if self.choice_ids else ()
            more = max(map(len, choices), default=self.max_new_tokens)
            if len(ids) + more > positions:
                what = "the longest choice" if choices else "the answer"
                left = positions - max(map(len, self.prompt_ids))
                advice = "shorten the prompt, or leave the question out"
                if not choices and left > 0:
                    advice = f"choose max_new_tokens of at most {left}"
                raise EvaluationError(
                    f"{where}: the prompt has {len(ids)} tokens and {what} up to {more}, more than "
                    f"the model's {positions} positions; {advice}"
                )

    def question_set(self) -> QuestionSet:
        """What the store keeps of them, so that answers can be judged anew."""
        return QuestionSet(
            task=self.task,
            task_version=self.version,
            decoding=self.decoding,
            split=self.split,
            references=self.references,
            extract=self.extract,
            choices=self.choices,
        )

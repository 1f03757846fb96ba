"""Many adapters asked many tasks over one resident base, each answer handed on as it comes.

`engine.decoding` answers for all adapters at once. What it can't do is done one adapter after
another by transformers' own `generate` (`score.answer_questions`): another family, a quantised
base, an adapter that is more than LoRA factors on linear layers and that `attach_files` takes.
Which of both answered is not part of a score: they agree but for rounding (tests hold that in
float32 the texts are equal).

Answers that are known already are not asked for again. What is written where is not known here.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from loratune.engine.decoding import (
    ContinuationRequest,
    ContinuationScore,
    Decoder,
    Request,
)
from loratune.engine.decoding_adapters import Adapter, read_layers
from loratune.engine.memory import out_of_memory_reason, release_memory
from loratune.errors import CapacityError, LoratuneError, ModelError, one_line
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.score import answer_questions, choices_answer, grade
from loratune.methods.attach_files import attach_files
from loratune.models.load import Base
from loratune.models.targets import block_linears
from loratune.records import Answer, NotScored, Said, Scored

AnsweringEngine = Literal["auto", "packed", "reference"]
# One adapter after another, questions between which answers are handed on.
QUESTIONS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """One adapter and one task. `kept`: the answers that are known already, by question."""

    adapter: Adapter
    questions: TaskQuestions
    kept: Mapping[int, Answer] = field(default_factory=dict[int, Answer])


def answer_all(
    base: Base,
    asked: Sequence[Asked],
    *,
    engine: AnsweringEngine,
    remark: Callable[[str], None],
    unsafe_exec: bool = False,
) -> Generator[Said | Scored | NotScored]:
    """Ask, judge and count; `asked` of an event is an index of `asked`.

    Each of `asked` ends with one `Scored` or `NotScored`; every new answer stands in one `Said`
    before that. What goes wrong with one adapter costs no other.

    Args:
        base: a frozen base without an adapter; it is as it was when this ends or is closed.
        asked: a task may be asked of many adapters, an adapter many tasks.
        engine: `packed` asks many adapters at once and gives no score where that can't be done,
            `reference` asks one after another, `auto` does what can be done.
        remark: is told, under `auto`, what is asked one by one and why.
        unsafe_exec: see `sandbox.choose_isolation`.
    """
    work = _Work(base, asked, engine=engine, remark=remark, unsafe_exec=unsafe_exec)
    yield from work.complete(range(len(asked)))
    for of_task in work.packable():
        yield from work.ask_at_once(of_task)
    yield from work.ask_one_by_one()


class _Work:
    """What is left to ask, and how."""

    def __init__(
        self,
        base: Base,
        asked: Sequence[Asked],
        *,
        engine: AnsweringEngine,
        remark: Callable[[str], None],
        unsafe_exec: bool,
    ) -> None:
        self._base = base
        self._asked = asked
        self._engine = engine
        self._remark = remark
        self._unsafe_exec = unsafe_exec
        self._answers = [dict(one.kept) for one in asked]
        self._left = dict.fromkeys(range(len(asked)))
        # Why something is not asked together with the others, by the index of what is asked.
        self._apart = dict[int, str]()
        # Why no engine can ask it, likewise.
        self._unfit = dict[int, str]()
        self._decoder: Decoder | None = None

    def complete(self, indices: Sequence[int]) -> Generator[Scored | NotScored]:
        """Judge those of them that have all their answers."""
        for index in indices:
            questions = self._asked[index].questions
            if not questions.prompts:
                yield self._not_scored(
                    index, f"task {questions.task} has no questions; give at least one"
                )
            elif len(self._answers[index]) == len(questions.prompts):
                answers = [self._answers[index][at] for at in range(len(questions.prompts))]
                del self._left[index]
                self._answers[index] = {}
                try:
                    score, predictions = grade(answers, questions, unsafe_exec=self._unsafe_exec)
                except LoratuneError as error:
                    yield NotScored(index, one_line(error))
                else:
                    yield Scored(index, score, predictions)

    def packable(self) -> list[list[int]]:
        """What is left and can be asked of many adapters at once, a list for each task."""
        if self._engine == "reference" or not self._left:
            return []
        linears = block_linears(self._base.model)
        if not all(linear.weight.is_floating_point() for linear in linears.values()):
            self._set_apart(list(self._left), "many adapters at once need a base in 16 or 32 bits")
            return []
        adapters = {
            _key(self._asked[index].adapter): self._asked[index].adapter for index in self._left
        }
        refused, unfit = dict[str, str](), dict[str, str]()
        for key, adapter in adapters.items():
            if adapter is not None:
                try:
                    read_layers(self._base.model, adapter)
                except Exception as error:  # noqa: BLE001 - it must not cost the other adapters
                    refused[key] = one_line(error)
                    # Put on and taken off, so that nothing is said to answer that does not fit.
                    try:
                        attach_files(self._base.model, adapter).detach()
                    except Exception as damage:  # noqa: BLE001 - likewise
                        unfit[key] = one_line(damage)
        tasks = dict[tuple[str, str], list[int]]()
        for index in tuple(self._left):
            one = self._asked[index]
            key = _key(one.adapter)
            reason = refused.get(key)
            if key in unfit:
                self._unfit[index] = unfit[key]
            elif reason is None:
                tasks.setdefault((one.questions.task, one.questions.decoding), []).append(index)
            else:
                self._set_apart([index], reason)
        if tasks:
            can_be_seated = {key: one for key, one in adapters.items() if key not in refused}
            self._decoder = Decoder(self._base, can_be_seated)
        return list(tasks.values())

    def ask_at_once(self, indices: Sequence[int]) -> Generator[Said | Scored | NotScored]:
        """One task of many adapters."""
        assert self._decoder is not None
        questions = self._asked[indices[0]].questions
        at = [
            (index, number)
            for index in indices
            for number in range(len(questions.prompts))
            if number not in self._answers[index]
        ]
        told = (
            _choose(self._decoder, self._asked, at)
            if questions.choices
            else _write(self._decoder, self._asked, at)
        )
        reason: str | None = None
        try:
            with closing(told):
                for index, number, answer in told:
                    self._answers[index][number] = answer
                    yield Said(index, {number: answer})
                    yield from self.complete([index])
        except (ModelError, CapacityError) as error:
            reason = str(error)
        except LoratuneError as error:  # It would be the same one by one.
            for index in indices:
                if index in self._left:
                    yield self._not_scored(index, one_line(error))
        except Exception as error:  # noqa: BLE001 - a kernel that fails must not cost the scores
            reason = one_line(error)
        if reason is not None:
            release_memory(self._base.device)
            self._set_apart([index for index in indices if index in self._left], reason)

    def ask_one_by_one(self) -> Generator[Said | Scored | NotScored]:
        """All that is left, an adapter after the other."""
        for index, reason in self._unfit.items():
            yield self._not_scored(index, reason)
        if self._engine == "packed":
            for index in tuple(self._left):
                yield self._not_scored(
                    index, f"{self._apart[index]}; give --engine auto to ask one by one"
                )
        if self._apart and self._left:
            self._say_what_is_apart()
        for index in tuple(self._left):
            try:
                yield from self._ask_alone(index)
            except Exception as error:  # noqa: BLE001 - it must not cost the other adapters
                yield self._not_scored(index, one_line(error))
                if out_of_memory_reason(error) is not None:
                    release_memory(self._base.device)

    def _ask_alone(self, index: int) -> Generator[Said | Scored | NotScored]:
        one, answers = self._asked[index], self._answers[index]
        left = [number for number in range(len(one.questions.prompts)) if number not in answers]
        # The base is adapted in place, so that it answers with the adapter until that is detached.
        attached = None if one.adapter is None else attach_files(self._base.model, one.adapter)
        try:
            for begin in range(0, len(left), QUESTIONS_AT_ONCE):
                some = left[begin : begin + QUESTIONS_AT_ONCE]
                said = answer_questions(self._base, chosen(one.questions, some))
                new = dict(zip(some, said, strict=True))
                answers.update(new)
                yield Said(index, new)
        finally:
            if attached is not None:
                attached.detach()
        yield from self.complete([index])

    def _set_apart(self, indices: Sequence[int], reason: str) -> None:
        self._apart.update(dict.fromkeys(indices, " ".join(reason.split())))

    def _say_what_is_apart(self) -> None:
        """One remark for all: a study may have hundreds of adapters."""
        left = {index: reason for index, reason in self._apart.items() if index in self._left}
        if not left:
            return
        adapters = {_key(self._asked[index].adapter) for index in left}
        reasons = list(dict.fromkeys(left.values()))
        others = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
        self._remark(
            f"{len(adapters)} of {len({_key(one.adapter) for one in self._asked})} adapters answer "
            f"one by one: {reasons[0]}{others}"
        )

    def _not_scored(self, index: int, reason: str) -> NotScored:
        del self._left[index]
        self._answers[index] = {}
        return NotScored(index, reason)


def _write(
    decoder: Decoder, asked: Sequence[Asked], at: Sequence[tuple[int, int]]
) -> Generator[tuple[int, int, Answer]]:
    """(index of what is asked, question, answer) as they end."""
    requests = [
        Request(
            adapter=_key(asked[index].adapter),
            prompt_ids=asked[index].questions.prompt_ids[number],
            max_new_tokens=asked[index].questions.max_new_tokens,
            stop=asked[index].questions.stop,
            end_ids=asked[index].questions.end_ids,
        )
        for index, number in at
    ]
    with closing(decoder.answers(requests)) as answers:
        for one in answers:
            index, number = at[one.index]
            yield index, number, one.answer


def _choose(
    decoder: Decoder, asked: Sequence[Asked], at: Sequence[tuple[int, int]]
) -> Generator[tuple[int, int, Answer]]:
    """(index of what is asked, question, answer), once all choices of a question have been read."""
    requests = list[ContinuationRequest]()
    belongs = list[tuple[int, int]]()
    for place, (index, number) in enumerate(at):
        questions = asked[index].questions
        for position, choice in enumerate(questions.choice_ids[number]):
            belongs.append((place, position))
            requests.append(
                ContinuationRequest(
                    _key(asked[index].adapter), questions.prompt_ids[number], choice
                )
            )
    found = dict[int, dict[int, ContinuationScore]]()
    with closing(decoder.log_likelihoods(requests)) as scores:
        for request, score in scores:
            place, position = belongs[request]
            of_one = found.setdefault(place, {})
            of_one[position] = score
            index, number = at[place]
            if len(of_one) == len(asked[index].questions.choice_ids[number]):
                of_one = found.pop(place)
                yield index, number, choices_answer([of_one[key] for key in sorted(of_one)])


def chosen(asked: TaskQuestions, numbers: Sequence[int]) -> TaskQuestions:
    """Some of the questions."""
    fields = ("prompts", "prompt_ids", "references", "choices", "choice_ids")
    picked = dict[str, tuple[Any, ...]]()
    for name in fields:
        values: tuple[Any, ...] = getattr(asked, name)
        picked[name] = tuple(values[number] for number in numbers) if values else ()
    return replace(asked, **picked)


def _key(adapter: Adapter) -> str:
    """The decoder's name of an adapter; those in memory have none of their own."""
    if adapter is None:
        return "the base"
    return str(adapter) if isinstance(adapter, Path) else f"in memory, {id(adapter)}"

"""Many adapters asked at once, against one after another by transformers' own `generate`."""

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from loratune.engine.decoding import Answered, Decoder
from loratune.errors import CapacityError, ModelError
from loratune.evaluation import answering
from loratune.evaluation.answering import Asked, answer_all
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.score import NOT_FINITE, score_task
from loratune.methods.adapter_files import AdapterFiles
from loratune.models.load import Base
from loratune.records import Answer, Prediction, Said, Score, Scored
from tiny_adapters import mixed_adapters, tiny_adapter
from tiny_models import tiny_tokenizer
from tiny_trials import tiny_base

TEXTS = (
    "What is 2 + 3?",
    "A",
    "Two trains leave a station, one of them late.",
    "How many?",
    "Seven red apples and 8 more",
)


def numbers(**changes: Any) -> TaskQuestions:
    """Questions whose answers are written; the plain base's answers have digits in them."""
    tokenizer = tiny_tokenizer()
    made = TaskQuestions(
        task="gsm8k",
        version="1",
        split="test",
        grader="pissa",
        prompts=TEXTS,
        prompt_ids=tuple(tuple(tokenizer(text).input_ids) for text in TEXTS),
        references=("5", "1", None, "3", "15"),
        max_new_tokens=12,
        stop=("e",),
    )
    return replace(made, **changes)


def choices() -> TaskQuestions:
    tokenizer = tiny_tokenizer()
    texts = tuple((f"{n} apples", "none", f"all {n}")[: 2 + n % 2] for n in range(len(TEXTS)))
    return numbers(
        task="arc_easy",
        grader="normalised",
        references=("0", "1", "0", "2", "1"),
        choices=texts,
        choice_ids=tuple(
            tuple(tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in of_one)
            for of_one in texts
        ),
    )


class Told:
    """All events, in the forms in which tests look at them; none may come out of place."""

    def __init__(
        self,
        base: Base,
        asked: Sequence[Asked],
        *,
        engine: Any = "auto",
        most_answers: int | None = None,
    ) -> None:
        self.remarks = list[str]()
        self.said = [dict[int, Answer]() for _ in asked]
        self.scores = dict[int, Score]()
        self.predictions = dict[int, tuple[Prediction, ...]]()
        self.failures = dict[int, str]()
        events = answer_all(base, asked, engine=engine, remark=self.remarks.append)
        with closing(events):
            for event in events:
                ended = self.scores.keys() | self.failures.keys()
                assert event.asked not in ended
                if isinstance(event, Said):
                    # No question is asked twice, nor one whose answer was known.
                    known = self.said[event.asked].keys() | asked[event.asked].kept.keys()
                    assert not known & event.answers.keys()
                    self.said[event.asked].update(event.answers)
                elif isinstance(event, Scored):
                    self.scores[event.asked] = event.score
                    self.predictions[event.asked] = event.predictions
                else:
                    self.failures[event.asked] = event.reason
                if most_answers is not None and sum(map(len, self.said)) >= most_answers:
                    return
        assert self.scores.keys() | self.failures.keys() == set(range(len(asked)))


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def on_the_head(base: Base) -> AdapterFiles:
    """An adapter that also changes the output head: PEFT can do that, many at once cannot."""
    files = tiny_adapter(base.model, "lora", seed=9)
    rank = int(str(files.config["r"]))
    head: Any = base.model.get_output_embeddings()
    generator = torch.Generator().manual_seed(5)
    named: Any = files.config["target_modules"]
    return AdapterFiles(
        config={**files.config, "target_modules": [*named, "lm_head"]},
        tensors={
            **files.tensors,
            "base_model.model.lm_head.lora_A.weight": torch.randn(
                rank, head.in_features, generator=generator
            ),
            "base_model.model.lm_head.lora_B.weight": torch.randn(
                head.out_features, rank, generator=generator
            ),
        },
    )


def mixed(base: Base) -> list[Asked]:
    """Every method, no two adapters of one rank, and the plain base, on two tasks."""
    adapters = mixed_adapters(base.model).values()
    return [Asked(one, task) for one in adapters for task in (numbers(), choices())]


def same(found: Told, base: Base, asked: Sequence[Asked]) -> None:
    """What was found is what `score_task` says of each alone."""
    for index, one in enumerate(asked):
        score, predictions = score_task(base, one.adapter, one.questions)
        assert found.scores[index] == score
        if not one.questions.choices:
            assert found.predictions[index] == predictions
            continue
        for mine, alone in zip(found.predictions[index], predictions, strict=True):
            assert mine.verdict == alone.verdict
            # float32 sums of a few logits of about 10 nats: rounding is about 1e-6 each.
            assert json.loads(mine.text) == pytest.approx(json.loads(alone.text), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_all_at_once_every_adapter_gets_the_score_that_it_gets_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    base = tiny_base(family)
    before = weights(base)
    asked = mixed(base)
    with monkeypatch.context() as patched:
        patched.setattr(answering, "answer_questions", never)
        found = Told(base, asked, engine="packed")
    assert (found.remarks, found.failures) == ([], {})
    same(found, base, asked)
    assert all(torch.equal(before[name], value) for name, value in weights(base).items())
    # Otherwise equal scores would say little.
    assert len({found.predictions[index] for index in found.predictions}) == len(asked)
    assert len({one.verdict for of_one in found.predictions.values() for one in of_one}) >= 3


def test_the_reference_engine_asks_one_after_another_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    base = tiny_base()
    asked = mixed(base)
    monkeypatch.setattr(answering, "Decoder", never)
    found = Told(base, asked, engine="reference")
    assert (found.remarks, found.failures) == ([], {})
    same(found, base, asked)


@pytest.mark.parametrize("engine", ["packed", "reference"])
@pytest.mark.parametrize("num_answers", [1, 13, 29])
def test_stopped_anywhere_it_goes_on_without_asking_twice_and_ends_the_same(
    engine: str, num_answers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answering, "QUESTIONS_AT_ONCE", 2)
    base = tiny_base()
    before = weights(base)
    adapters = list(mixed_adapters(base.model).values())[:4]
    asked = [Asked(one, task) for one in adapters for task in (numbers(), choices())]
    whole = Told(base, asked, engine=engine)
    stopped = Told(base, asked, engine=engine, most_answers=num_answers)
    assert all(torch.equal(before[name], value) for name, value in weights(base).items())
    assert num_answers <= sum(map(len, stopped.said)) <= num_answers + 1
    left = [
        replace(one, kept=said)
        for index, (one, said) in enumerate(zip(asked, stopped.said, strict=True))
        if index not in stopped.scores
    ]
    rest = Told(base, left, engine=engine)
    numbered = [index for index in range(len(asked)) if index not in stopped.scores]
    assert len(rest.scores) == len(numbered)
    for place, index in enumerate(numbered):
        assert rest.scores[place] == whole.scores[index]
        if not asked[index].questions.choices:
            assert rest.predictions[place] == whole.predictions[index]
    num_asked = sum(map(len, stopped.said)) + sum(map(len, rest.said))
    assert num_asked == sum(len(one.questions.prompts) for one in asked)


def test_all_answers_known_no_model_is_asked(monkeypatch: pytest.MonkeyPatch):
    base = tiny_base()
    kept = {number: Answer(f"{number}", 3, True) for number in range(len(TEXTS))}
    monkeypatch.setattr(answering, "Decoder", never)
    monkeypatch.setattr(answering, "answer_questions", never)
    found = Told(base, [Asked(None, numbers(), kept)])
    assert [one.text for one in found.predictions[0]] == ["0", "1", "2", "3", "4"]
    assert found.said == [{}]


# What many adapters at once can't do -------------------------------------------------------------


def test_an_adapter_that_cannot_be_seated_answers_by_itself_with_one_remark():
    base = tiny_base()
    adapters = [tiny_adapter(base.model, "lora"), on_the_head(base), None]
    asked = [Asked(one, task) for one in adapters for task in (numbers(), choices())]
    found = Told(base, asked)
    same(found, base, asked)
    (remark,) = found.remarks
    assert remark.startswith(
        "1 of 3 adapters answer one by one: the adapter does not fit this base"
    )
    assert found.predictions[0] != found.predictions[2]


def test_asked_for_by_name_what_cannot_be_seated_is_refused_and_costs_no_other():
    base = tiny_base()
    adapters = [tiny_adapter(base.model, "lora"), on_the_head(base), None]
    found = Told(base, [Asked(one, numbers()) for one in adapters], engine="packed")
    assert found.remarks == []
    assert found.scores.keys() == {0, 2}
    assert "lm_head" in found.failures[1]
    assert found.failures[1].endswith("give --engine auto to ask one by one")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModelError("its logits differ"), "its logits differ"),
        (CapacityError("not even one row fits"), "not even one row fits"),
        (RuntimeError("no kernel image"), "RuntimeError: no kernel image"),
    ],
)
def test_what_breaks_in_the_middle_goes_on_one_by_one_and_keeps_what_was_answered(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
):
    base = tiny_base()
    asked = mixed(base)[::2][:5]
    real = Decoder.answers

    def breaks(decoder: Decoder, requests: Iterable[Any]) -> Generator[Answered]:
        with closing(real(decoder, requests)) as answers:
            for number, one in enumerate(answers):
                if number == 7:
                    raise error
                yield one

    monkeypatch.setattr(Decoder, "answers", breaks)
    found = Told(base, asked)
    (remark,) = found.remarks
    assert remark.endswith(f"of 5 adapters answer one by one: {told}")
    assert found.failures == {}
    same(found, base, asked)
    refused = Told(base, asked, engine="packed")
    assert refused.remarks == []
    assert sum(map(len, refused.said)) == 7
    assert {reason.partition(";")[0] for reason in refused.failures.values()} == {told}


def test_over_a_quantised_base_adapters_answer_one_by_one(monkeypatch: pytest.MonkeyPatch):
    quantised = nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    monkeypatch.setattr(answering, "block_linears", lambda model: {"q_proj": quantised})
    base = tiny_base()
    asked = [Asked(tiny_adapter(base.model, "lora"), numbers())]
    found = Told(base, asked)
    same(found, base, asked)
    assert found.remarks == [
        "1 of 1 adapters answer one by one: many adapters at once need a base in 16 or 32 bits"
    ]
    assert Told(base, asked, engine="packed").scores == {}


# What can't be scored at all ----------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "packed", "reference"])
@pytest.mark.parametrize("lacks", ["a module", "a layer"])
def test_an_adapter_that_is_not_whole_is_refused_alike_and_nothing_is_said_to_answer(
    engine: str, lacks: str
):
    base = tiny_base()
    before = weights(base)
    files = tiny_adapter(base.model, "lora")
    if lacks == "a module":
        broken = AdapterFiles({**files.config, "modules_to_save": ["lm_head"]}, files.tensors)
    else:
        kept = {name: one for name, one in files.tensors.items() if "layers.0.mlp.up" not in name}
        broken = AdapterFiles(files.config, kept)
    found = Told(base, [Asked(broken, numbers()), Asked(files, numbers())], engine=engine)
    assert found.remarks == []
    assert found.scores.keys() == {1}
    assert f"{1 if lacks == 'a module' else 2} of its tensors are missing" in found.failures[0]
    assert all(torch.equal(before[name], value) for name, value in weights(base).items())


@pytest.mark.parametrize("engine", ["auto", "packed", "reference"])
def test_what_is_wrong_with_one_costs_no_other(engine: str, tmp_path: Any):
    base = tiny_base()
    files = tiny_adapter(base.model, "lora")
    asked = [
        Asked(tmp_path / "gone", numbers()),
        Asked(files, numbers(max_new_tokens=600)),
        Asked(files, numbers(prompts=(), prompt_ids=(), references=())),
        Asked(files, numbers()),
    ]
    found = Told(base, asked, engine=engine)
    assert found.scores.keys() == {3}
    assert "holds no adapter_config.json" in found.failures[0]
    assert "the model's 512 positions" in found.failures[1]
    assert found.failures[2] == "task gsm8k has no questions; give at least one"
    assert all("\n" not in reason for reason in found.failures.values())


@pytest.mark.parametrize("engine", ["auto", "packed", "reference"])
def test_an_adapter_with_nan_in_it_makes_errors_with_a_reason_and_touches_no_other(
    engine: str, monkeypatch: pytest.MonkeyPatch
):
    base = tiny_base()
    files = tiny_adapter(base.model, "lora")
    tensors = {name: one.clone() for name, one in files.tensors.items()}
    next(iter(tensors.values()))[0, 0] = float("nan")
    broken = AdapterFiles(files.config, tensors)
    asked = [Asked(one, task) for task in (numbers(), choices()) for one in (broken, files, None)]
    # Whoever comes after it sits in its slot and its seat.
    monkeypatch.setattr(
        answering, "Decoder", partial(Decoder, num_slots=2, num_seats=1, tokens_per_prefill=60)
    )
    found = Told(base, asked, engine=engine)
    assert (found.remarks, found.failures) == ([], {})
    for index in (0, 3):
        assert found.scores[index].errors == found.scores[index].total == len(TEXTS)
        assert [one.reason for one in found.predictions[index]] == [NOT_FINITE] * len(TEXTS)
    others = [1, 2, 4, 5]
    alone = Told(base, [asked[index] for index in others], engine=engine)
    for place, index in enumerate(others):
        assert alone.scores[place] == found.scores[index]
        assert alone.said[place].keys() == found.said[index].keys()
        if not asked[index].questions.choices:
            assert alone.said[place] == found.said[index]


@pytest.mark.parametrize("engine", ["packed", "reference"])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_a_short_prompt_does_not_hide_a_weight_that_is_not_finite(engine: str, projection: str):
    base = tiny_base()
    files = tiny_adapter(base.model, "lora")
    tensors = {name: one.clone() for name, one in files.tensors.items()}
    name = next(name for name in tensors if f"layers.1.self_attn.{projection}.lora_B" in name)
    tensors[name].fill_(float("nan"))
    broken = AdapterFiles(files.config, tensors)
    # One row without padding, and never more than 7 tokens: attention on a CPU then does not tell.
    ids = tuple(tiny_tokenizer()(TEXTS[0]).input_ids[:5])
    one: dict[str, Any] = {"prompts": TEXTS[:1], "prompt_ids": (ids,), "references": ("0",)}
    two_choices = {"choices": (("a", "b"),), "choice_ids": (((40, 41), (50, 51)),)}
    tasks = (numbers(**one, max_new_tokens=2), replace(choices(), **one, **two_choices))
    found = Told(
        base, [Asked(who, task) for who in (broken, files) for task in tasks], engine=engine
    )
    for index in (0, 1):
        (prediction,) = found.predictions[index]
        assert (prediction.verdict, prediction.reason) == ("error", NOT_FINITE)
    for index in (2, 3):
        (prediction,) = found.predictions[index]
        assert prediction.reason is None


@pytest.mark.parametrize("engine", ["auto", "packed", "reference"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trainable_token_indices": [100_000]}, "does not fit this base: IndexError: "),
        ({"layer_replication": [[0, 9]]}, "does not fit this base: IndexError: "),
        ({"bias": "x"}, "does not fit this base: NotImplementedError: "),
        ({"r": 0}, "does not fit this base: ValueError: "),
        ({"rank_pattern": 3}, "does not fit this base: "),
        ({"target_modules": "(q_proj"}, "does not fit this base: "),
    ],
)
def test_an_adapter_that_peft_cannot_put_on_costs_no_other_its_score(
    engine: str, changes: dict[str, Any], told: str
):
    base = tiny_base()
    before = weights(base)
    files = tiny_adapter(base.model, "lora")
    broken = AdapterFiles({**files.config, **changes}, files.tensors)
    found = Told(base, [Asked(broken, numbers()), Asked(files, numbers())], engine=engine)
    assert found.scores.keys() == {1}
    assert told in found.failures[0]
    assert found.remarks == []
    assert all(torch.equal(before[name], value) for name, value in weights(base).items())


def never(*_: object, **__: object) -> Any:
    raise AssertionError("this must not be asked")

import json
from typing import Literal

import pytest

from loratune.data import demo_task
from loratune.data.prepare import Example, prepare
from loratune.errors import DataError, EvaluationError
from loratune.evaluation.questions import Question
from loratune.evaluation.sandbox import choosing
from loratune.evaluation.tasks import (
    ask,
    ask_validation,
    can_score,
    check_tasks,
    load_questions,
    task,
)
from loratune.study.schema import Data, Source, Task
from tiny_models import BOS_ID, EOS_ID, tiny_tokenizer

DATA = Data.model_validate(
    {
        "train": "x.jsonl",
        "prompt": "query",
        "response": "out",
        "template": "plain",
        "max_tokens": 64,
    }
)
QUESTIONS = (Question("1 + 1?", "2"), Question("9 {x} * 9?", "81"))


def with_template(**changes):
    return Data.model_validate(
        {**DATA.model_dump(exclude={"train"}), "train": "x.jsonl", **changes}
    )


def write_gsm8k(path, *answers):
    rows = [{"question": f"Question {n}?", "answer": answer} for n, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["gsm8k", "demo", "validation"])
def test_the_tasks_of_this_version_can_be_scored(name):
    assert can_score(name)
    assert task(name).name == name
    check_tasks([Task(name=name)])


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_task_of_programs_is_refused_before_anything_is_trained_where_none_can_be_run(
    name, monkeypatch
):
    monkeypatch.setattr(choosing, "trials", lambda: ())
    assert can_score(name)
    with pytest.raises(EvaluationError, match="cannot be isolated on this machine"):
        check_tasks([Task(name="gsm8k"), Task(name=name)])
    check_tasks([Task(name=name)], unsafe_exec=True)


def test_a_task_of_programs_has_no_grader_of_numbers():
    with pytest.raises(EvaluationError, match="mbpp is not judged by grader strict; choose tests"):
        check_tasks([Task(name="mbpp", grader="strict")], unsafe_exec=True)


def test_an_unknown_task_is_refused_with_a_near_name():
    assert not can_score("gms8k")
    with pytest.raises(EvaluationError, match=r"'gms8k' is unknown; .* did you mean 'gsm8k'\?"):
        task("gms8k")
    with pytest.raises(
        EvaluationError, match=r"choose one of gsm8k, svamp, .*, demo, validation, or the path"
    ):
        task("zzzz")


@pytest.mark.parametrize("name", ["demo", "validation"])
def test_data_for_a_task_with_questions_of_its_own_is_refused(name):
    with pytest.raises(EvaluationError, match="remove its `data:`"):
        check_tasks([Task(name=name, data=Source(file="x.jsonl"))])


@pytest.mark.parametrize("prompt", ["Q:", "Q: {question}", "{prompt} {x}", "{", "{prompt} }"])
def test_a_prompt_of_the_tasks_own_holds_prompt_and_nothing_else(prompt):
    with pytest.raises(EvaluationError, match="task gsm8k: prompt"):
        check_tasks([Task(name="gsm8k", prompt=prompt)])
    with pytest.raises(EvaluationError, match="task gsm8k: prompt"):
        ask(Task(name="gsm8k", prompt=prompt), QUESTIONS, data=DATA, tokenizer=tiny_tokenizer())


# ---------------------------------------------------------------------------- questions


def test_gsm8k_comes_from_the_hub_unless_the_study_says_otherwise(monkeypatch, tmp_path):
    asked = []

    def read_rows(source, *, folder):
        asked.append(source)
        return [{"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"}]

    monkeypatch.setattr("loratune.evaluation.gsm8k.read_rows", read_rows)
    assert load_questions(Task(name="gsm8k"), folder=tmp_path) == (Question("1 + 1?", "2"),)
    assert asked == [Source(id="openai/gsm8k", subset="main", split="test")]


def test_gsm8k_references_are_the_numbers_behind_the_marks(tmp_path):
    write_gsm8k(tmp_path / "q.jsonl", "2 #### of\n#### 18", "#### 1,450,000", "#### -3", "#### 1/2")
    given = Task(name="gsm8k", data=Source(file="q.jsonl"))
    questions = load_questions(given, folder=tmp_path)
    assert [one.reference for one in questions] == ["18", "1450000", "-3", "1/2"]
    assert questions[1].text == "Question 1?"


def test_only_the_first_questions_are_taken_where_the_study_says_so(tmp_path):
    write_gsm8k(tmp_path / "q.jsonl", "#### 1", "#### 2", "#### 3")
    given = Task(name="gsm8k", data=Source(file="q.jsonl"), questions=2)
    assert [one.reference for one in load_questions(given, folder=tmp_path)] == ["1", "2"]


def test_more_questions_than_there_are_is_an_error(tmp_path):
    write_gsm8k(tmp_path / "q.jsonl", "#### 1")
    given = Task(name="gsm8k", data=Source(file="q.jsonl"), questions=2)
    with pytest.raises(EvaluationError, match="questions=2, but there are 1"):
        load_questions(given, folder=tmp_path)


@pytest.mark.parametrize("answer", ["18", "#### eighteen", "#### 18 eggs", "####", "#### 1,2345"])
def test_a_gsm8k_reference_that_is_no_number_is_an_error_with_its_row(answer, tmp_path):
    write_gsm8k(tmp_path / "q.jsonl", "#### 1", answer)
    with pytest.raises(EvaluationError, match=r"q\.jsonl, row 2: the answer ends"):
        load_questions(Task(name="gsm8k", data=Source(file="q.jsonl")), folder=tmp_path)


def test_questions_that_cannot_be_read_are_the_tasks_error(tmp_path):
    with pytest.raises(EvaluationError, match=r"task gsm8k: .*q\.jsonl does not exist"):
        load_questions(Task(name="gsm8k", data=Source(file="q.jsonl")), folder=tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(EvaluationError, match=r"task gsm8k: .*row 1 has no field 'answer'"):
        load_questions(Task(name="gsm8k", data=Source(file="q.jsonl")), folder=tmp_path)


def test_demo_questions_are_those_of_the_test_split_with_the_results_of_their_sums(tmp_path):
    questions = load_questions(Task(name="demo"), folder=tmp_path)
    rows = demo_task.generate_rows(512, seed=0, split="test")
    assert [one.text for one in questions] == [row["question"] for row in rows]
    assert all(demo_task.split_of(one.text) == "test" for one in questions)
    for one, row in zip(questions, rows, strict=True):
        last_sum = row["answer"].rpartition("=")[2].partition(".")[0]
        assert one.reference is not None
        assert int(one.reference) == int(last_sum)


def test_validation_has_no_questions_to_load(tmp_path):
    with pytest.raises(EvaluationError, match="held-out rows"):
        load_questions(Task(name="validation"), folder=tmp_path)


# ---------------------------------------------------------------------------- asked


def test_a_question_takes_the_place_of_the_studys_prompt_inside_its_template():
    data = with_template(prompt="Q: {query}\nA:", template="<{prompt}>")
    asked = ask(Task(name="gsm8k"), QUESTIONS, data=data, tokenizer=tiny_tokenizer())
    assert asked.prompts == ("<Q: 1 + 1?\nA:>", "<Q: 9 {x} * 9?\nA:>")
    assert asked.references == ("2", "81")


def test_a_prompt_of_the_tasks_own_replaces_the_studys_prompt_and_template():
    data = with_template(prompt="{a} {b}", template="alpaca")
    given = Task(name="gsm8k", prompt="{prompt} Think.")
    asked = ask(given, QUESTIONS, data=data, tokenizer=tiny_tokenizer())
    assert asked.prompts == ("1 + 1? Think.", "9 {x} * 9? Think.")


def test_a_study_prompt_of_several_fields_needs_a_prompt_for_the_task():
    data = with_template(prompt="{a} {b}")
    with pytest.raises(DataError, match="give the task a prompt of its own"):
        ask(Task(name="gsm8k"), QUESTIONS, data=data, tokenizer=tiny_tokenizer())


def test_test_prompts_have_the_tokens_that_training_rows_begin_with(tmp_path):
    rows = [{"query": one.text, "out": f"#### {one.reference}"} for one in QUESTIONS]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = with_template(template="alpaca", max_tokens=400)
    for add_bos in (True, False):
        tokenizer = tiny_tokenizer(add_bos=add_bos)
        asked = ask(Task(name="gsm8k"), QUESTIONS, data=data, tokenizer=tokenizer)
        train = prepare(data, tokenizer=tokenizer, folder=tmp_path).choose(None).train
        for number, prompt_ids in enumerate(asked.prompt_ids):
            ids, is_target = train.row(number)
            assert prompt_ids == tuple(ids[~is_target].tolist())
            assert (prompt_ids[0] == BOS_ID) == add_bos
            assert prompt_ids[-1] != EOS_ID


def test_what_the_study_leaves_out_is_the_tasks_own_and_what_it_says_counts():
    asked = ask(Task(name="gsm8k"), QUESTIONS, data=DATA, tokenizer=tiny_tokenizer())
    assert (asked.grader, asked.max_new_tokens, asked.stop) == ("strict", 512, ())
    assert (asked.task, asked.split, asked.end_ids) == ("gsm8k", "test", ())
    given = Task(name="gsm8k", grader="pissa", max_new_tokens=9, stop=("a", "b"))
    asked = ask(given, QUESTIONS, data=DATA, tokenizer=tiny_tokenizer(), end_ids=[5])
    assert (asked.grader, asked.max_new_tokens, asked.stop) == ("pissa", 9, ("a", "b"))
    assert asked.end_ids == (5,)


def test_every_setting_and_every_question_is_in_the_decoding():
    def decoding(questions=QUESTIONS, data=DATA, **changes):
        given = Task(name="gsm8k", **changes)
        return ask(given, questions, data=data, tokenizer=tiny_tokenizer()).decoding

    decodings = [
        decoding(),
        decoding(max_new_tokens=9),
        decoding(stop=("a",)),
        decoding(stop=("a", "b")),
        decoding(stop=('a", "b',)),
        decoding(prompt="{prompt} Think."),
        decoding(data=with_template(template="alpaca")),
        decoding(QUESTIONS[:1]),
        decoding(QUESTIONS[::-1]),
        decoding((QUESTIONS[0], Question("9 {x} * 9?", "82"))),
        decoding((QUESTIONS[0], Question("9 {x} * 9?", None))),
    ]
    assert len(set(decodings)) == len(decodings)
    assert decoding() == decodings[0]
    assert decodings[2].startswith(
        'greedy;max_new_tokens=512;stop=["a"];questions=2;prompt=sha256:'
    )


# ---------------------------------------------------------------------------- validation


def examples(*responses):
    return [
        Example(prompt_text=f"<{n}>", prompt_ids=(1, n + 5), response_text=text, question=f"{n}")
        for n, text in enumerate(responses)
    ]


def test_validation_asks_the_held_out_rows_exactly_as_they_were_trained():
    asked = ask_validation(
        examples("so #### 4", "x. The answer is: 1,080"),
        data=DATA,
        tokenizer=tiny_tokenizer(),
        end_ids=[7],
    )
    assert asked.prompts == ("<0>", "<1>")
    assert asked.prompt_ids == ((1, 5), (1, 6))
    assert asked.references == ("4", "1080")
    assert (asked.task, asked.split, asked.end_ids) == ("validation", "validation", (7,))


def test_a_validation_answer_may_be_half_as_long_again_as_the_longest_reference():
    tokenizer = tiny_tokenizer(add_bos=False)
    asked = ask_validation(examples("#### 4", "x" * 40 + "#### 4"), data=DATA, tokenizer=tokenizer)
    assert 46 * 1.5 <= asked.max_new_tokens <= 47 * 1.5 + 1
    given = Task(name="validation", max_new_tokens=9)
    asked = ask_validation(examples("#### 4"), given=given, data=DATA, tokenizer=tokenizer)
    assert asked.max_new_tokens == 9


def test_validation_references_are_read_by_the_grader_that_reads_the_answers():
    rows = examples("#### 4", "The answer is: 17.6", "The answer is: \\frac{1}{2}")
    expected: dict[Literal["pissa", "strict"], tuple[str | None, ...]] = {
        "strict": ("4", "88/5", None),
        "pissa": (None, "18", "1"),
    }
    for grader, references in expected.items():
        given = Task(name="validation", grader=grader)
        asked = ask_validation(rows, given=given, data=DATA, tokenizer=tiny_tokenizer())
        assert asked.references == references


def test_held_out_rows_that_no_answer_could_match_are_an_error():
    given = Task(name="validation", grader="pissa")
    with pytest.raises(EvaluationError, match=r"'pissa' reads no number in any of the 2 held-out"):
        ask_validation(
            examples("#### 4", "#### 5"), given=given, data=DATA, tokenizer=tiny_tokenizer()
        )


def test_validation_without_held_out_rows_is_an_error():
    with pytest.raises(EvaluationError, match=r"add data\.validation"):
        ask_validation([], data=DATA, tokenizer=tiny_tokenizer())


def test_validation_takes_the_first_rows_and_a_prompt_of_its_own():
    given = Task(name="validation", questions=1, prompt="Q {prompt}")
    asked = ask_validation(
        examples("#### 4", "#### 5"), given=given, data=DATA, tokenizer=tiny_tokenizer()
    )
    assert asked.prompts == ("Q 0",)
    assert asked.prompt_ids == tuple(tuple(ids) for ids in tiny_tokenizer()(["Q 0"]).input_ids)
    assert asked.references == ("4",)

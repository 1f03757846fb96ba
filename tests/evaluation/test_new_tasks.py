"""Arithmetic, multiple choice and tasks of the user's own: formats, graders, versions."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loratune.errors import EvaluationError
from loratune.evaluation.custom import file_hash_of, read_task, version_of
from loratune.evaluation.graders import extracted, judge_choice, judge_exact
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.score import grade
from loratune.evaluation.tasks import ask, check_tasks, load_questions
from loratune.records import Answer
from loratune.study.schema import Data, Task
from tiny_models import BOS_ID, tiny_tokenizer

STUDY_DATA = Data.model_validate(
    {
        "train": "x.jsonl",
        "prompt": "q",
        "response": "a",
        "template": "Q: {prompt}\nA:",
        "max_tokens": 64,
    }
)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path.name


def labelled(*texts: str, labels: str = "ABCD") -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(labels[: len(texts)])}


def loaded(tmp_path: Path, name: str, row: dict[str, Any]) -> Any:
    given = Task.model_validate({"name": name, "data": {"file": write(tmp_path / "q.json", [row])}})
    check_tasks([given], folder=tmp_path)
    (question,) = load_questions(given, folder=tmp_path)
    return question


@pytest.mark.parametrize(
    ("name", "row", "text", "reference"),
    [
        (
            "svamp",
            {"Body": "Dan had $ 3 left", "Question": "What did it cost?", "Answer": 1.0},
            "Dan had $ 3 left. What did it cost?",
            "1",
        ),
        ("multiarith", {"question": " How many? ", "final_ans": "15"}, "How many?", "15"),
        ("addsub", {"instruction": "How many now ? ", "answer": "4.5"}, "How many now ?", "9/2"),
        ("singleeq", {"question": "How far?", "answer": 1080}, "How far?", "1080"),
    ],
)
def test_word_problems_are_read_in_every_format(tmp_path, name, row, text, reference):
    question = loaded(tmp_path, name, row)
    assert (question.text, question.reference) == (text, reference)


@pytest.mark.parametrize(
    ("name", "row", "text", "reference", "choices"),
    [
        (
            "arc_easy",
            {"question": "Why?", "choices": labelled("a", "b", labels="12"), "answerKey": "2"},
            "Why?", "1", ("a", "b"),
        ),
        (
            "openbookqa",
            {"question_stem": "To save", "choices": labelled("x", "y"), "answerKey": "A"},
            "To save", "0", ("x", "y"),
        ),
        (
            "boolq",
            {"passage": "P.", "question": "is it", "answer": True},
            "P.\nis it?", "1", ("no", "yes"),
        ),
        (
            "piqa",
            {"goal": "How?", "sol1": "so", "sol2": "thus", "label": 1},
            "How?", "1", ("so", "thus"),
        ),
        (
            "arc_challenge",
            {
                "instruction": "Please choose the correct answer to the question: Which?\n\n"
                "Answer1: one. Answer2: two. Answer3: three.\n\nAnswer format: answer1/answer2",
                "answer": "answer3",
            },
            "Which?", "2", ("one.", "two.", "three."),
        ),
        (
            "boolq",
            {
                "instruction": "Please answer the following question with true or false, question: "
                "is it?\n\nAnswer format: true/false",
                "answer": "false",
            },
            "is it?", "0", ("false", "true"),
        ),
    ],
)  # fmt: skip
def test_choices_are_read_in_both_formats(tmp_path, name, row, text, reference, choices):
    question = loaded(tmp_path, name, row)
    assert (question.text, question.reference, question.choices) == (text, reference, choices)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("svamp", {"text": "?"}, "expected one of"),
        ("multiarith", {"question": "?", "final_ans": "many"}, "is no number"),
        ("arc_easy", {"question": "?", "choices": labelled("a"), "answerKey": "B"},
         "not in the format"),
        ("piqa", {"goal": "?", "sol1": "a", "sol2": "b", "label": -1}, "unlabelled"),
        ("boolq", {"passage": "", "question": "", "answer": "yes"}, "neither true nor false"),
        ("piqa", {"instruction": "x Solution1: a Solution3: b", "answer": "solution1"}, "numbered"),
    ],
)  # fmt: skip
def test_rows_in_no_format_are_refused_with_their_number(tmp_path, name, row, message):
    with pytest.raises(EvaluationError, match=message) as error:
        loaded(tmp_path, name, row)
    assert "row 1" in str(error.value)


def test_addsub_says_that_it_needs_a_copy():
    with pytest.raises(EvaluationError, match="name your copy"):
        load_questions(Task(name="addsub"), folder=Path())


def test_choices_follow_the_prompt_after_one_space_and_their_tokens_are_the_wholes(tmp_path):
    row = {"goal": "How?", "sol1": "so", "sol2": "thus then", "label": 0}
    given = Task.model_validate(
        {"name": "piqa", "data": {"file": write(tmp_path / "q.json", [row])}}
    )
    tokenizer = tiny_tokenizer()
    asked = ask(given, load_questions(given, folder=tmp_path), data=STUDY_DATA, tokenizer=tokenizer)
    assert asked.prompts == ("Q: How?\nA:",)
    for choice, ids in zip(asked.choices[0], asked.choice_ids[0], strict=True):
        whole = tokenizer(f"Q: How?\nA: {choice}").input_ids
        assert [*asked.prompt_ids[0], *ids] == whole
        assert whole[0] == BOS_ID
    assert asked.grader == "normalised"
    assert asked.decoding.startswith("log-likelihood;questions=1;")


@pytest.mark.parametrize("end", ["A:", "A: ", "A:\n", "A: \n "])
def test_choices_tokens_are_lm_evaluation_harness_own_where_words_take_the_space_before(
    tmp_path, end
):
    # Of tokenizers that join a space to the word after it: the rule and the oracle must see it.
    harness: Any = importlib.import_module("lm_eval.api.model")
    tokenizer = byte_level_tokenizer(["How? A: yes please no thanks the answer is 5 so thus"] * 9)
    assert tokenizer.tokenize(" please") == ["\u0120please"]
    row = {"goal": "How?", "sol1": "yes please", "sol2": "no", "label": 0}
    given = Task.model_validate(
        {
            "name": "piqa",
            "data": {"file": write(tmp_path / "q.json", [row])},
            "prompt": f"Q: {{prompt}}\n{end}",
        }
    )
    asked = ask(given, load_questions(given, folder=tmp_path), data=STUDY_DATA, tokenizer=tokenizer)
    model = SimpleNamespace(backend="causal", tok_encode=lambda text: tokenizer(text).input_ids)
    delimiter = "" if end[-1].isspace() else " "
    for choice, ids in zip(asked.choices[0], asked.choice_ids[0], strict=True):
        expected = harness.TemplateLM._encode_pair(model, asked.prompts[0], delimiter + choice)
        assert (list(asked.prompt_ids[0]), list(ids)) == expected


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2, Llama 3 and Qwen have, that has learned every word of a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_choice_without_text_is_refused_with_its_question(tmp_path):
    row = {"goal": "How?", "sol1": "so", "sol2": "", "label": 0}
    given = Task.model_validate(
        {"name": "piqa", "data": {"file": write(tmp_path / "q.json", [row])}}
    )
    questions = load_questions(given, folder=tmp_path)
    with pytest.raises(EvaluationError, match="question 1: the choice '' has no text"):
        ask(given, questions, data=STUDY_DATA, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("values", "grader", "verdict"),
    [
        ([-4.0, -5.0], "plain", "correct"),
        ([-5.0, -4.0], "plain", "wrong"),
        # Per character -4/2 against -5/10: the longer one is likelier.
        ([-4.0, -5.0], "normalised", "wrong"),
        ([-4.0, -4.0], "plain", "correct"),  # of equal ones the first
        ([float("nan"), -4.0], "plain", "error"),
    ],
)
def test_the_likeliest_choice_counts_as_it_is_or_by_character(values, grader, verdict):
    assert judge_choice(values, ("ab", "abcdefghij"), reference="0", grader=grader) == verdict


def test_exact_compares_words_and_extract_takes_the_first_group():
    assert judge_exact(" deep  blue\n", reference="deep blue", finished=True) == "correct"
    assert judge_exact("Deep blue", reference="deep blue", finished=True) == "wrong"
    assert judge_exact(None, reference="x", finished=False) == "truncated"
    assert judge_exact("x", reference=None, finished=True) == "error"
    assert extracted("so. Answer: 7 apples", r"Answer: (\d+)") == "7"
    assert extracted("nothing", r"Answer: (\d+)") is None


@given(
    grader=st.sampled_from(["pissa", "strict", "number", "exact"]),
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=12),
    data=st.data(),
)
def test_every_question_is_counted_once_whatever_was_answered(grader, texts, data):
    references = tuple(data.draw(st.sampled_from([None, "3", "-1/2"])) for _ in texts)
    answers = [Answer(text, 1, data.draw(st.booleans())) for text in texts]
    asked = TaskQuestions(
        task="t", version="1", split="test", grader=grader, prompts=tuple(texts), prompt_ids=(),
        references=references, max_new_tokens=4, stop=(),
    )  # fmt: skip
    score, predictions = grade(answers, asked)
    assert score.total == len(texts) == len(predictions)
    assert score.errors >= sum(reference is None for reference in references)


# ---------------------------------------------------------------------------- the user's own

OWN = """\
task: colours
data: rows.json
prompt: "{question} Say only the colour:"
reference: "{colour}"
grader: exact
extract: "(\\\\w+)"
stop: ["\\n"]
max_new_tokens: 8
"""


def own(tmp_path: Path, text: str = OWN) -> Path:
    row = {"question": "Sky?", "colour": "blue", "listed": ["red", "blue"], "right": 1}
    write(tmp_path / "rows.json", [row])
    path = tmp_path / "colours.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_task_of_the_users_own_is_asked_and_judged_as_its_file_says(tmp_path):
    own(tmp_path)
    given = Task(name="colours.yaml")
    check_tasks([given], folder=tmp_path)
    asked = ask(
        given,
        load_questions(given, folder=tmp_path),
        data=STUDY_DATA,
        tokenizer=tiny_tokenizer(),
        folder=tmp_path,
    )
    assert asked.prompts == ("Sky? Say only the colour:",)  # not within the study's template
    assert (asked.task, asked.stop, asked.max_new_tokens) == ("colours", ("\n",), 8)
    score, _ = grade([Answer("blue, I think", 4, True)], asked)
    assert score.correct == 1
    assert score.task_version.startswith("sha256:")


@pytest.mark.parametrize("grader", ["strict", "pissa", "number"])
@pytest.mark.parametrize("reference", ["0", "-0", 0, "0.0"])
def test_a_reference_of_zero_is_a_number(tmp_path, grader, reference):
    own(tmp_path, OWN.replace("grader: exact", f"grader: {grader}").replace("extract", "#"))
    row = {"question": "How many?", "colour": reference}
    write(tmp_path / "rows.json", [row])
    (question,) = load_questions(Task(name="colours.yaml"), folder=tmp_path)
    assert question.reference == "0"


def test_another_content_is_another_version(tmp_path):
    first = read_task(own(tmp_path)).version
    assert read_task(own(tmp_path, OWN.replace("8", "9"))).version != first


def test_another_grader_or_another_way_to_put_choices_is_another_version(tmp_path, monkeypatch):
    first = read_task(own(tmp_path)).version
    monkeypatch.setattr("loratune.evaluation.graders.VERSION", "another")
    second = read_task(own(tmp_path)).version
    assert second != first
    assert file_hash_of(second) == file_hash_of(first)
    assert version_of("sha256:0", is_choice=True) != version_of("sha256:0")


def test_a_users_own_choices_take_the_right_ones_text_or_number(tmp_path):
    text = OWN.replace("grader: exact", "grader: plain").replace(
        "max_new_tokens: 8", "choices: listed"
    )
    for reference in ('"{colour}"', "right"):
        own(tmp_path, text.replace('"{colour}"', reference))
        (question,) = load_questions(Task(name="colours.yaml"), folder=tmp_path)
        assert (question.reference, question.choices) == ("1", ("red", "blue"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("grader: exact", "grader: exakt", "grader"),
        ("task: colours\n", "", "task"),
        ("grader: exact", "grader: plain", "need `choices:`"),
        ('extract: "(\\\\w+)"', 'extract: "\\\\w+"', "no group in parentheses"),
        ('extract: "(\\\\w+)"', 'extract: "("', "extract"),
        ('"{colour}"', '"{color}"', "did you mean 'colour'"),
        ("data: rows.json", "data: none.json", "does not exist"),
        ("task: colours", "tusk: [", "tusk|expected"),
        ('stop: ["\\n"]', 'stop: ""', "stop.0: .*at least 1 character"),
        ("task: colours", "task: gsm8k", "a task of loratune's; give it another name"),
        ("grader: exact", "grader: number", "no number in any of 1 references .*row"),
    ],
)
def test_a_file_that_is_no_task_is_refused_in_one_line(tmp_path, old, new, message):
    own(tmp_path, OWN.replace(old, new))
    with pytest.raises(EvaluationError, match=message) as error:
        load_questions(Task(name="colours.yaml"), folder=tmp_path)
    assert "\n" not in str(error.value)


def test_two_files_of_one_name_are_refused(tmp_path):
    own(tmp_path)
    (tmp_path / "others.yaml").write_text(OWN, encoding="utf-8")
    both = [Task(name="colours.yaml"), Task(name="others.yaml")]
    with pytest.raises(EvaluationError, match=r"colours.yaml and others.yaml are both called"):
        check_tasks(both, folder=tmp_path)


def test_a_grader_that_cannot_judge_a_tasks_answers_is_refused_before_training(tmp_path):
    for name, grader in (("gsm8k", "plain"), ("arc_easy", "strict"), ("humaneval", "strict")):
        with pytest.raises(EvaluationError, match="is not judged by grader"):
            check_tasks([Task(name=name, grader=grader)], unsafe_exec=True)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="cannot be read"):
        check_tasks([Task(name="missing.yaml")], folder=tmp_path)

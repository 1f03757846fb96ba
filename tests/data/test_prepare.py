import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratune.data.prepare import PreparedSource, prepare
from loratune.errors import DataError
from loratune.study.schema import Data
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTIONS = [{"q": f"Question {i}?", "a": f"{i:03d}", "source": str(i // 2)} for i in range(20)]


def prepared(folder: Path, rows, *, test_questions=None, **named) -> PreparedSource:
    (folder / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    section = {"train": "d.jsonl", "prompt": "q", "response": "a", "max_tokens": 64} | named
    return prepare(
        Data.model_validate(section),
        tokenizer=TOKENIZER,
        folder=folder,
        test_questions=test_questions,
    )


def texts(rows) -> list[str]:
    return [str(TOKENIZER.decode(rows.row(i)[0])) for i in range(len(rows))]


rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "q": st.text("ab ", max_size=12),
            "a": st.text("xyz", max_size=12),
            "g": st.sampled_from("12345"),
        }
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows_strategy,
    too_long=st.sampled_from(["drop", "truncate"]),
    order=st.sampled_from(["first", "random"]),
    held=st.integers(0, 4),
    group_by=st.sampled_from([None, "g"]),
    data=st.data(),
)
def test_every_row_is_accounted_groups_stay_whole_and_smaller_n_is_nested(
    tmp_path, rows, too_long, order, held, group_by, data
):
    validation = {"rows": held} | ({"group_by": group_by} if group_by else {}) if held else None
    try:
        source = prepared(
            tmp_path,
            rows,
            too_long=too_long,
            rows_order=order,
            max_tokens=14,
            **({"validation": validation} if validation else {}),
        )
    except DataError as error:
        if not any(reason in str(error) for reason in ("whole groups", "leaves no", "none of")):
            raise
        return
    most = source.choose(None)
    num_remaining = most.facts.num_train_rows
    larger = data.draw(st.integers(1, num_remaining))
    smaller = data.draw(st.integers(1, larger))

    for choice, asked in (
        (most, num_remaining),
        *((source.choose(n), n) for n in (larger, smaller)),
    ):
        summary = choice.summary
        assert summary.num_train_rows == len(choice.train) == asked
        assert summary.num_validation_rows == held
        assert (
            summary.num_source_rows
            == len(rows)
            == (
                summary.num_dropped_too_long
                + summary.num_validation_rows
                + summary.num_left_over
                + summary.num_train_rows
            )
        )
        assert choice.facts.max_row_tokens <= 14
        # Independent of the code: BOS, characters, EOS.
        sizes = [1 + len(row["q"]) + len(row["a"]) + 1 for row in rows]
        if too_long == "drop":
            assert summary.num_dropped_too_long == sum(size > 14 for size in sizes)
            assert summary.num_truncated == 0
        else:
            no_target = sum(1 + len(row["q"]) >= 14 for row in rows)
            assert summary.num_dropped_too_long == no_target
            assert summary.num_truncated == sum(size > 14 for size in sizes) - no_target
    chosen = [texts(source.choose(n).train) for n in (smaller, larger)]
    for text in set(chosen[0]):
        assert chosen[0].count(text) <= chosen[1].count(text)
    if held and group_by is None:
        assert most.summary.num_in_validation == 0


def test_held_out_groups_of_a_field_never_stand_on_both_sides(tmp_path):
    source = prepared(tmp_path, QUESTIONS, validation={"rows": 6, "group_by": "source"})
    choice = source.choose(None)
    assert choice.validation is not None
    number = [int(text.split("Question ")[1].split("?")[0]) for text in texts(choice.validation)]

    assert len(number) == 6
    assert choice.summary.num_validation_groups == 3
    # Two questions of every source, in the order of the rows.
    assert choice.summary.validation_sources == (0, 0, 1, 1, 2, 2)
    single = prepared(tmp_path, QUESTIONS, validation={"rows": 6}).choose(None)
    assert single.summary.validation_sources == ()
    assert {i // 2 for i in number} == {i // 2 for i in number if i ^ 1 in number}


def test_the_same_validation_rows_are_held_out_whatever_n_is(tmp_path):
    source = prepared(tmp_path, QUESTIONS, validation={"rows": 5})
    few, many = source.choose(2), source.choose(15)
    assert few.validation is not None

    assert texts(few.validation) == texts(many.validation)
    assert texts(few.train) == texts(many.train)[:2]
    assert few.summary.num_left_over == 13


def test_the_same_rows_from_any_format_have_the_same_fingerprint(tmp_path):
    named = {"validation": {"rows": 4, "group_by": "source"}, "rows_order": "random"}
    expected = prepared(tmp_path, QUESTIONS, **named).choose(10).facts.fingerprint
    (tmp_path / "d.json").write_text(json.dumps({"rows": QUESTIONS}))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["source", "a", "q"])
        writer.writeheader()
        writer.writerows(QUESTIONS)
    numbers = [row | {"source": int(row["source"])} for row in QUESTIONS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbers), tmp_path / "d.parquet")

    for name in ("d.json", "d.csv", "d.parquet"):
        choice = prepared(tmp_path, QUESTIONS, train=name, **named).choose(10)
        assert choice.facts.fingerprint == expected
        assert "001" in "".join(texts(choice.train)) + "".join(texts(choice.validation))
    assert expected.startswith("data-")
    assert len(expected) == len("data-") + 64


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 9},
        {"suffix": "\n"},
        {"template": "{prompt} "},
        {"validation": {"rows": 5}},
        {"rows_order": "random"},
        {"prompt": "a"},
    ],
)
def test_whatever_changes_a_token_or_a_row_changes_the_fingerprint(tmp_path, change):
    num_rows = change.pop("rows", 10)
    base = prepared(tmp_path, QUESTIONS, validation={"rows": 4}).choose(10)

    other = prepared(tmp_path, QUESTIONS, **({"validation": {"rows": 4}} | change)).choose(num_rows)

    assert other.facts.fingerprint != base.facts.fingerprint


def test_the_loss_mask_is_part_of_the_fingerprint(tmp_path):
    rows = [{"q": "ab", "a": "cd"}]
    moved = [{"q": "abc", "a": "d"}]
    one, other = prepared(tmp_path, rows).choose(None), prepared(tmp_path, moved).choose(None)

    np.testing.assert_array_equal(one.train.input_ids, other.train.input_ids)
    assert one.facts.fingerprint != other.facts.fingerprint


def test_a_validation_file_leaves_all_rows_to_training(tmp_path):
    held = [{"q": "question 3", "a": "held"}, {"q": "q" * 80, "a": "a"}, {"q": "new", "a": "b"}]
    (tmp_path / "v.jsonl").write_text("\n".join(json.dumps(row) for row in held))

    choice = prepared(tmp_path, QUESTIONS, validation={"file": "v.jsonl"}).choose(None)

    assert choice.summary.num_train_rows == 20
    assert choice.summary.num_left_over == 0
    assert choice.summary.num_validation_rows == 2
    assert choice.summary.num_validation_dropped == 1
    assert choice.summary.num_in_validation == 1
    assert [example.question for example in choice.validation_examples] == ["question 3", "new"]


def test_rows_of_a_test_set_and_repeated_rows_are_found_under_other_spellings(tmp_path):
    rows = [*QUESTIONS, {"q": "question 3", "a": "again"}]

    choice = prepared(
        tmp_path,
        rows,
        prompt="Question: {q}\nAnswer:",
        test_questions={"gsm8k": ["QUESTION 3?", "Question 19", "other"], "svamp": []},
    ).choose(None)

    assert choice.summary.num_in_test == (("gsm8k", 3), ("svamp", 0))
    assert choice.summary.num_duplicate_rows == 1


def test_facts_count_tokens_targets_and_squares(tmp_path):
    rows = [{"q": "abc", "a": "de"}, {"q": "a", "a": "b"}]

    facts = prepared(tmp_path, rows).choose(None).facts

    # BOS + 3 + 2 + EOS = 7 of which 3 with loss; BOS + 1 + 1 + EOS = 4 of which 2.
    assert (facts.num_tokens, facts.sum_squared_tokens) == (11, 49 + 16)
    assert (facts.num_target_tokens, facts.max_row_tokens) == (5, 7)


def test_examples_hold_the_prompt_as_the_row_begins_with_it(tmp_path):
    choice = prepared(
        tmp_path, QUESTIONS, template="alpaca", max_tokens=512, validation={"rows": 3}
    ).choose(5)
    assert choice.validation is not None

    for index, example in enumerate(choice.validation_examples):
        ids, is_target = choice.validation.row(index)
        assert list(example.prompt_ids) == ids[~is_target].tolist()
        assert TOKENIZER.decode(list(example.prompt_ids[1:])) == example.prompt_text
        assert example.prompt_text.endswith("### Response:")
        assert example.question in example.prompt_text
        assert example.question.startswith("Question ")
        assert TOKENIZER.decode(ids[is_target]) == example.response_text + "</s>"
    assert choice.end_ids == (TOKENIZER.eos_token_id,)


def test_a_chats_example_asks_for_its_last_answer(tmp_path):
    chat = [
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
        {"role": "assistant", "content": "A2"},
    ]
    choice = prepared(
        tmp_path,
        [{"m": chat}, {"m": chat[:2]}],
        prompt=None,
        response=None,
        messages="m",
        template="chatml",
        max_tokens=512,
        validation={"file": "d.jsonl"},
    ).choose(None)
    example = choice.validation_examples[0]

    assert TOKENIZER.decode(list(example.prompt_ids[1:])) == example.prompt_text
    assert example.prompt_text.endswith("U2<|im_end|>\n<|im_start|>assistant\n")
    assert (example.response_text, example.question) == ("A2", "U1")


@pytest.mark.parametrize(
    ("rows", "prompt", "response", "group_by"),
    [
        (
            [
                {"query": f"Q{i}", "response": "A", "original_question": f"O{i // 3}", "type": "t"}
                for i in range(9)
            ],
            "query",
            "response",
            "original_question",
        ),
        (
            [{"query": f"Q{i}", "answer": "A", "resource": "r"} for i in range(9)],
            "query",
            "answer",
            None,
        ),
    ],
)
def test_the_columns_of_the_papers_data_sets_work(tmp_path, rows, prompt, response, group_by):
    validation = {"rows": 3} | ({"group_by": group_by} if group_by else {})

    choice = prepared(
        tmp_path, rows, prompt=prompt, response=response, validation=validation
    ).choose(None)

    assert (choice.summary.num_train_rows, choice.summary.num_validation_rows) == (6, 3)
    assert choice.summary.num_validation_groups == (1 if group_by else 3)


@pytest.mark.parametrize(
    ("named", "num_rows", "message"),
    [
        ({}, 21, "rows=21 is more than there are: 20 rows remain"),
        ({"validation": {"rows": 20}}, None, "validation.rows=20 leaves no training row"),
        ({"max_tokens": 3}, None, "none of 20 rows has a response within max_tokens=3"),
        (
            {"validation": {"rows": 2, "group_by": "sorce"}},
            None,
            r"d.jsonl, row 1 \(validation.group_by\) has no field 'sorce'.*did you mean 'source'",
        ),
        ({"validation": {"file": "absent.jsonl"}}, None, r"absent.jsonl does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_numbers(tmp_path, named, num_rows, message):
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, QUESTIONS, **named).choose(num_rows)

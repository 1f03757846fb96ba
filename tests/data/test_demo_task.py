"""demo:task: determinism, disjoint splits, correct arithmetic, and another distribution."""

# The rows that are compared with stand in one line each.
# ruff: noqa: E501

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from loratune.data.demo_task import (
    GAIN_VERBS,
    LARGEST_NUMBER,
    LOSS_VERBS,
    PROMPT,
    generate_rows,
    split_of,
)
from loratune.errors import DataError
from loratune.models.demo import resolve_demo_model

TOOLS = Path(__file__).parents[2] / "tools"
EQUATION = re.compile(r"([0-9]+) ([-+*]) ([0-9]+) = ([0-9]+)")


def load_corpus_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_corpus", TOOLS / "demo_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_corpus"] = module
    spec.loader.exec_module(module)
    return module


def test_a_longer_list_begins_with_the_shorter_one():
    assert generate_rows(300, seed=5)[:20] == generate_rows(20, seed=5)


def test_the_first_rows_are_the_same_in_every_version():
    # Trial ids hash these rows: a change of a word makes other trials of all that were run.
    assert generate_rows(2, seed=0) == FIRST_TRAIN_ROWS
    assert generate_rows(1, seed=0, split="test") == FIRST_TEST_ROWS


def test_seeds_give_different_rows():
    assert generate_rows(20, seed=0) != generate_rows(20, seed=1)


def test_no_question_is_in_both_splits_whatever_the_seeds():
    def normalised(rows: list[dict[str, str]]) -> set[str]:
        return {" ".join(re.findall(r"[a-z0-9]+", row["question"].lower())) for row in rows}

    train = normalised(generate_rows(20_000, seed=0)) | normalised(generate_rows(5_000, seed=1))
    test = normalised(generate_rows(5_000, seed=0, split="test"))
    assert not train & test


def test_the_split_does_not_look_at_case_spaces_or_punctuation():
    for row in generate_rows(50, seed=3, split="test"):
        assert split_of("  " + row["question"].upper().replace(" ", "  ") + "!") == "test"


def test_questions_repeat_rarely():
    rows = generate_rows(5_000, seed=0)
    assert len({row["question"] for row in rows}) > 4_980


def test_answers_work_the_two_steps_correctly_and_end_in_the_result():
    rows = generate_rows(3_000, seed=0) + generate_rows(1_000, seed=0, split="test")
    for row in rows:
        steps = [(int(a), op, int(b), int(c)) for a, op, b, c in EQUATION.findall(row["answer"])]
        assert len(steps) == 2, row
        for a, op, b, c in steps:
            assert c == {"+": a + b, "-": a - b, "*": a * b}[op], row
            assert min(a, b, c) >= 0, row
            assert max(a, b, c) <= LARGEST_NUMBER, row
        assert steps[0][3] in (steps[1][0], steps[1][2]), row
        assert row["answer"].endswith(f" The answer is: {steps[1][3]}"), row


def test_every_number_of_the_question_is_used_in_the_worked_answer():
    for row in generate_rows(1_000, seed=0):
        given = {int(n) for n in re.findall(r"[0-9]+", row["question"])}
        worked = {int(n) for step in EQUATION.findall(row["answer"]) for n in step if n.isdigit()}
        assert given <= worked, row


def test_gains_add_and_losses_subtract():
    for row in generate_rows(2_000, seed=0):
        for verbs, sign in ((GAIN_VERBS, "+"), (LOSS_VERBS, "-")):
            for number in re.findall(rf"(?:{'|'.join(verbs)}) ([0-9]+)", row["question"]):
                assert f" {sign} {number} = " in row["answer"], row


def test_the_pretraining_corpus_computes_nothing_with_the_tasks_verbs():
    documents = load_corpus_tool().generate_documents(20_000, seed=20)
    corpus = "\n".join(documents)
    assert "The answer is:" not in corpus
    for row in generate_rows(500, seed=0):
        assert row["question"] not in corpus
    for verb in GAIN_VERBS + LOSS_VERBS:
        # The words themselves must be there, or their embeddings would be untrained.
        said = [text for text in documents if re.search(rf"\b{verb}\b", text)]
        assert said
        # What they mean is told (more, or less); no story is told, and no result asked for.
        assert not [text for text in said if "=" in text or "Question" in text]


def test_one_token_of_the_task_is_new_to_the_models():
    tokenizer = AutoTokenizer.from_pretrained(resolve_demo_model("demo:1m").folder)
    documents = load_corpus_tool().generate_documents(20_000, seed=20)
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    known = {token for document in encoded for token in document.ids}
    rows = generate_rows(2_000, seed=0)
    used = {
        token
        for row in rows
        for text in (PROMPT.format(question=row["question"]), row["answer"])
        for token in tokenizer(text, add_special_tokens=False).input_ids
    }
    # "How many plums do both own?": its embedding is what it was drawn as, and stays so.
    assert {tokenizer.decode([token]) for token in used - known} == {" do"}


@pytest.mark.parametrize("num_rows", [-1, -100])
def test_a_negative_number_of_rows_is_refused(num_rows: int):
    with pytest.raises(DataError, match=f"num_rows={num_rows}"):
        generate_rows(num_rows, seed=0)


def test_an_unknown_split_is_refused_with_the_ones_there_are():
    with pytest.raises(DataError, match=r"'dev'.*'train' or 'test'"):
        generate_rows(1, seed=0, split="dev")  # pyright: ignore[reportArgumentType]


def test_no_rows_is_an_empty_list():
    assert generate_rows(0, seed=0) == []


FIRST_TRAIN_ROWS = [
    {
        "question": "The plums of Hana number 5, and those of Pam are 2 below that. How many plums do both own?",
        "answer": "Step 1: 5 - 2 = 3. Step 2: 5 + 3 = 8. The answer is: 8",
    },
    {
        "question": "Out of 20 cards, Dora first receives 6. Later Dora receives 4. Find how many cards there are at the end.",
        "answer": "First 20 + 6 = 26. Then 26 + 4 = 30. The answer is: 30",
    },
]
FIRST_TEST_ROWS = [
    {
        "question": "Fay fills 2 boxes with 4 plums in each, then drops 2. How many plums does Fay end up with?",
        "answer": "Step 1: 2 * 4 = 8. Step 2: 8 - 2 = 6. The answer is: 6",
    },
]

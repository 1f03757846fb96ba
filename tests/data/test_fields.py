import pytest

from loratune.data.fields import FieldChoice, detect_fields
from loratune.errors import DataError


@pytest.mark.parametrize(
    ("row", "choice"),
    [
        ({"prompt": "p", "completion": "c"}, FieldChoice("prompt", "completion")),
        ({"instruction": "i", "output": "o"}, FieldChoice("instruction", "output")),
        ({"question": "q", "answer": "a", "id": 1}, FieldChoice("question", "answer")),
        (
            {"query": "q", "response": "r", "original_question": "o", "type": "t"},
            FieldChoice("query", "response"),
        ),
        ({"query": "q", "answer": "a"}, FieldChoice("query", "answer")),
        ({"messages": [{"role": "user", "content": "u"}]}, FieldChoice(messages="messages")),
    ],
)
def test_well_known_columns_are_found(row, choice):
    assert detect_fields([row, row]) == choice


def test_alpaca_input_is_added_only_where_some_row_has_one():
    empty = {"instruction": "i", "input": "", "output": "o"}

    assert detect_fields([empty]).prompt == "instruction"
    assert detect_fields([empty, empty | {"input": "x"}]).prompt == "{instruction}\n\n{input?}"


def test_unknown_columns_are_listed_and_asked_for():
    with pytest.raises(DataError, match="columns frage, antwort; name them with prompt: and"):
        detect_fields([{"frage": "f", "antwort": "a"}])


def test_a_column_that_some_rows_lack_does_not_count():
    with pytest.raises(DataError, match="no prompt and response"):
        detect_fields([{"question": "q", "answer": "a"}, {"question": "q"}])


def test_two_possible_choices_are_an_error_not_a_guess():
    with pytest.raises(DataError, match="more than one choice"):
        detect_fields([{"question": "q", "answer": "a", "prompt": "p", "completion": "c"}])

"""Prompt, response and chat through templates into tokens and loss masks.

The tokenizer has one token a character, so that decoded text shows to the letter what is a target.
"""

import re
from typing import Any

import pytest
from tokenizers import processors

from loratune.data.encode import encode, encode_prompts
from loratune.data.templates import fill, prompt_for, render_rows
from loratune.errors import DataError
from loratune.study.schema import Data
from tiny_models import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The shapes of published templates, written anew: BOS and no generation prompt (Llama 2); EOS after
# the last turn alone (Phi-3); reasoning in the last turn only (Qwen3); no system turn (Gemma).
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + CHATML
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TWO_TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]


def tokenizer(chat_template: str | None = None, *, add_bos: bool = True):
    made = tiny_tokenizer(add_bos=add_bos)
    made.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]}
    )
    made.chat_template = chat_template
    return made


def section(**named) -> Data:
    fields = {} if "messages" in named else {"prompt": "q", "response": "a"}
    return Data.model_validate({"train": "d.jsonl", "max_tokens": 10_000} | fields | named)


def encoded(row, data, made):
    """(text of the row, its stretches with loss) with special tokens shown."""
    rendered = render_rows([row], data, tokenizer=made, source="d.jsonl")
    rows = encode(rendered, tokenizer=made, template=data.template, max_tokens=data.max_tokens).rows
    ids, is_target = rows.row(0)
    text = ""
    for token, has_loss in zip(ids.tolist(), is_target.tolist(), strict=True):
        piece = made.decode([token])
        text += f"\1{piece}\2" if has_loss else piece
    text = text.replace("\2\1", "")
    return text.replace("\1", "").replace("\2", ""), re.findall("\1(.*?)\2", text, re.DOTALL)


def test_alpaca_is_the_papers_prompt_and_the_response_follows_at_once():
    text, targets = encoded(
        {"q": "Add 1 and 2.", "a": "It is 3."}, section(template="alpaca"), tokenizer()
    )

    assert text == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:It is 3.</s>"
    )
    assert targets == ["It is 3.</s>"]


@pytest.mark.parametrize(
    ("named", "text", "target"),
    [
        ({}, "<s>Q+A</s>", "+A</s>"),
        ({"suffix": "\n"}, "<s>Q+A\n</s>", "+A\n</s>"),
        ({"template": "Q: {prompt}\nA:"}, "<s>Q: Q\nA:+A</s>", "+A</s>"),
        ({"template": "{{{prompt}}}"}, "<s>{Q}+A</s>", "+A</s>"),
        ({"prompt": "[{q}|{c}]"}, "<s>[Q|C]+A</s>", "+A</s>"),
        ({"response": "{a}!{c}"}, "<s>Q+A!C</s>", "+A!C</s>"),
    ],
)
def test_loss_falls_on_response_suffix_and_eos_alone(named, text, target):
    assert encoded({"q": "Q", "a": "+A", "c": "C"}, section(**named), tokenizer()) == (
        text,
        [target],
    )


def test_a_tokenizer_without_bos_gets_none():
    assert encoded({"q": "Q", "a": "A"}, section(), tokenizer(add_bos=False))[0] == "QA</s>"


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "$A </s> </s>"])
def test_an_eos_that_the_tokenizer_adds_itself_never_stands_in_the_middle(single):
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        special_tokens=[("<s>", made.bos_token_id), ("</s>", made.eos_token_id)],
    )

    text, targets = encoded({"q": "Q", "a": "A"}, section(), made)

    assert text == ("<s>" if "<s>" in single else "") + "QA</s>"
    assert targets == ["A</s>"]


def test_a_token_that_nothing_predicts_carries_no_loss():
    _, targets = encoded({"q": "", "a": "AB"}, section(), tokenizer(add_bos=False))

    assert targets == ["B</s>"]


def test_a_field_that_holds_braces_is_not_read_as_a_template():
    text, _ = encoded({"q": "{a} {{x}}", "a": "A"}, section(prompt="<{q}>"), tokenizer())

    assert text == "<s><{a} {{x}}>A</s>"


def test_an_optional_field_takes_the_space_before_it_along_when_it_is_absent():
    prompt = "{instruction}\n\n{input?}"

    assert fill(prompt, {"instruction": "I", "input": "X"}, where="row") == "I\n\nX"
    for row in (
        {"instruction": "I", "input": ""},
        {"instruction": "I"},
        {"instruction": "I", "input": None},
    ):
        assert fill(prompt, row, where="row") == "I"


@pytest.mark.parametrize(
    ("named", "row", "message"),
    [
        (
            {"prompt": "questoin"},
            {"question": "Q", "a": "A"},
            r"d.jsonl, row 1 has no field 'questoin'; its fields are 'question', 'a'; "
            "did you mean 'question'",
        ),
        ({"prompt": "{q} {ctx}"}, {"q": "Q", "a": "A"}, "has no field 'ctx'"),
        ({}, {"q": "Q", "a": None}, "field 'a' is null"),
        ({}, {"q": ["Q"], "a": "A"}, "field 'q' is a list; give a text"),
        ({"prompt": "{q"}, {"q": "Q", "a": "A"}, "has a single '{'"),
        (
            {"template": "{prompt} {q}"},
            {"q": "Q", "a": "A"},
            "has no field 'q'; its fields are 'prompt'",
        ),
    ],
)
def test_a_field_that_is_not_there_is_refused_with_the_row_and_the_nearest(named, row, message):
    with pytest.raises(DataError, match=message):
        encoded(row, section(**named), tokenizer())


def test_numbers_become_text_as_python_writes_them():
    assert encoded({"q": 7, "a": 1.5}, section(), tokenizer())[0] == "<s>71.5</s>"


# ---------------------------------------------------------------------------- chats


@pytest.mark.parametrize(
    ("template", "chat_template", "text", "targets"),
    [
        (
            "chat",
            CHATML,
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
            ["A<|im_end|>"],
        ),
        ("chat", LLAMA2, "<s>[INST] Q [/INST] A </s>", [" A </s>"]),
        (
            "chat",
            PHI3,
            "<|user|>\nQ<|im_end|>\n<|assistant|>\nA<|im_end|>\n</s>",
            ["A<|im_end|>\n</s>"],
        ),
        (
            "chat",
            QWEN3,
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>",
            ["<think>\n\n</think>\n\nA<|im_end|>"],
        ),
        ("chat", NO_END, "user: Q\nassistant: A\n</s>", ["A\n</s>"]),
        (
            "chatml",
            None,
            "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
            ["A<|im_end|>"],
        ),
    ],
)
def test_a_chat_ends_with_its_own_end_of_turn_and_bos_never_doubles(
    template, chat_template, text, targets
):
    made = tokenizer(chat_template)

    assert encoded({"q": "Q", "a": "A"}, section(template=template), made) == (text, targets)


def test_chatml_over_a_vocabulary_without_its_tokens_still_ends_with_eos():
    text, targets = encoded({"q": "Q", "a": "A"}, section(template="chatml"), tiny_tokenizer())

    assert text.endswith("assistant\nA<|im_end|></s>")
    assert targets == ["A<|im_end|></s>"]


@pytest.mark.parametrize(
    ("template", "chat_template", "targets"),
    [
        ("chat", CHATML, ["A1<|im_end|>", "A2<|im_end|>"]),
        ("chat", PHI3, ["A1<|im_end|>", "A2<|im_end|>\n</s>"]),
        ("chat", NO_END, ["A1\n", "A2\n</s>"]),
        ("chatml", None, ["A1<|im_end|>", "A2<|im_end|>"]),
    ],
)
def test_loss_falls_on_every_assistant_turn_and_its_end_alone(template, chat_template, targets):
    made = tokenizer(chat_template)
    data = section(messages="m", template=template)

    text, found = encoded({"m": TWO_TURNS}, data, made)

    assert found == targets
    for content in ("S", "U1", "U2"):
        assert content in text


def test_tokens_of_a_chat_are_those_of_the_template_itself():
    made = tokenizer(CHATML)
    data = section(messages="m", template="chat")
    rendered = render_rows([{"m": TWO_TURNS}], data, tokenizer=made, source="d")
    rows = encode(rendered, tokenizer=made, template="chat", max_tokens=1000).rows

    whole = made.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)

    # The line end after the last turn's end trains nothing and is left out.
    assert rows.row(0)[0].tolist() == whole[:-1]


def test_loss_agrees_with_the_generation_marks_of_a_template_that_has_them():
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = tokenizer(marked)
    rendered = render_rows(
        [{"m": TWO_TURNS}], section(messages="m", template="chat"), tokenizer=made, source="d"
    )
    rows = encode(rendered, tokenizer=made, template="chat", max_tokens=1000).rows

    encoding: Any = made.apply_chat_template(
        TWO_TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )

    assert rows.row(0)[1].astype(int).tolist() == encoding["assistant_masks"][:-1]


def test_what_follows_the_last_answer_is_left_out():
    made = tokenizer(CHATML)
    data = section(messages="m", template="chat")

    assert encoded({"m": [*TWO_TURNS, {"role": "user", "content": "U3"}]}, data, made) == encoded(
        {"m": TWO_TURNS}, data, made
    )


def test_sharegpt_json_text_and_text_parts_are_the_same_chat():
    made = tokenizer(CHATML)
    data = section(messages="m", template="chat")
    same = [
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]',
        [
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": "A", "tool_calls": None},
        ],
    ]

    results = [encoded({"m": chat}, data, made) for chat in same]

    assert all(result == results[0] for result in results)
    assert results[0][1] == ["A<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_turns():
    with pytest.raises(DataError, match=r"renders message 3 in another way .* template: chatml"):
        encoded({"m": TWO_TURNS}, section(messages="m", template="chat"), tokenizer(QWEN3))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "user", "content": "Q"}], "no assistant turn"),
        ([], "is no list of messages"),
        ("hello", "is a text that is no JSON list"),
        (["hello"], "message 1 is no object"),
        ([{"role": "bot", "content": "Q"}], "role 'bot'; expected one of system, developer"),
        ([{"role": "user", "content": None}], "message 1 has a content that is no text"),
        ([{"text": "Q"}], "message 1 has keys text; expected role and content"),
        (
            [{"role": "assistant", "content": "A", "tool_calls": [{"id": 1}]}],
            "tool calls, which are not supported",
        ),
    ],
)
def test_messages_that_are_no_chat_are_refused_with_their_place(chat, message):
    with pytest.raises(DataError, match=f"d.jsonl, row 1.*{message}"):
        encoded({"m": chat}, section(messages="m", template="chatml"), tokenizer())


def test_a_refusal_of_the_chat_template_is_passed_on_in_one_line():
    data = section(messages="m", template="chat")

    with pytest.raises(
        DataError, match=r"row 1: the tokenizer's chat template refuses .*no system"
    ):
        encoded({"m": TWO_TURNS}, data, tokenizer(NO_SYSTEM))


def test_a_tokenizer_without_chat_template_points_to_chatml():
    with pytest.raises(DataError, match="has none; use template: chatml"):
        encoded({"q": "Q", "a": "A"}, section(template="chat"), tokenizer())


def test_a_template_that_prints_the_date_prints_the_same_one_on_any_day():
    text, _ = encoded({"q": "Q", "a": "A"}, section(template="chat"), tokenizer(DATED))

    assert text.startswith("26 Jul 2024\n<|im_start|>user")


def test_a_suffix_that_the_chat_template_trims_is_refused():
    trimming = CHATML.replace("m['content'] }}", "m['content'] | trim }}")

    with pytest.raises(DataError, match="drops the suffix"):
        encoded({"q": "Q", "a": "A"}, section(template="chat", suffix="\n"), tokenizer(trimming))
    assert encoded({"q": "Q", "a": "A"}, section(template="chat", suffix="\n"), tokenizer(CHATML))[
        1
    ] == ["A\n<|im_end|>"]


# ---------------------------------------------------------------------------- asking


@pytest.mark.parametrize(
    ("named", "chat_template"),
    [
        ({}, None),
        ({"template": "alpaca"}, None),
        ({"prompt": "Question: {q}\nAnswer:"}, None),
        ({"template": "chat"}, CHATML),
        ({"template": "chat"}, LLAMA2),
        ({"template": "chatml"}, None),
    ],
)
def test_a_test_question_gets_the_very_tokens_that_a_training_row_begins_with(named, chat_template):
    made = tokenizer(chat_template)
    data = section(**named)
    rendered = render_rows([{"q": "Why?", "a": "A"}], data, tokenizer=made, source="d")
    ids, is_target = encode(
        rendered, tokenizer=made, template=data.template, max_tokens=999
    ).rows.row(0)

    prompt = prompt_for("Why?", data, tokenizer=made)
    (prompt_ids,) = encode_prompts([prompt], tokenizer=made, template=data.template)

    assert prompt_ids == ids[~is_target].tolist()
    assert rendered[0].question == "Why?"


def test_a_tasks_own_decoding_prompt_replaces_the_studys():
    data = section(template="alpaca", prompt="Question: {q}")

    assert prompt_for("1+1?", data, tokenizer=tokenizer(), template="Q: {prompt} Think.") == (
        "Q: 1+1? Think."
    )


def test_a_prompt_of_several_fields_cannot_be_asked_one_question():
    with pytest.raises(DataError, match="made of 2 fields and a test question is one"):
        prompt_for("Q", section(prompt="{q} {c}"), tokenizer=tokenizer())


def test_a_tokenizer_without_eos_is_refused():
    made = tokenizer()
    made.eos_token = None

    with pytest.raises(DataError, match="no EOS"):
        encoded({"q": "Q", "a": "A"}, section(), made)

"""A row's fields as text: what is prompt, what is response, and where the loss falls.

A rendered row is a list of text segments, each with or without loss. How text becomes tokens is
`encode`'s business. The Alpaca text is that of the PiSSA and MiLoRA papers' code: nothing follows
the last colon, and the response follows at once.

Chats are rendered by the tokenizer's own template and cut by *prefix rendering*: the text up to an
assistant's turn, with the generation prompt, is what the model sees before it answers; the text
that the turn adds, through the token that ends it, carries the loss. This needs no
`{% generation %}` marks, which few templates have. It does need a template in which later turns
leave earlier text alone; some drop the reasoning of earlier turns (Qwen3), and those conversations
are refused, because a model trained on them would learn text that it never has to write.
"""
# transformers' tokenizers are only partly annotated.
# pyright: reportUnknownMemberType=false

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from loratune.errors import DataError
from loratune.study.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)

# Some chat templates print today's date. Rows must not change overnight, so a macro that hides
# transformers' function of this name gives them the default date of Llama 3's own template. (A
# function cannot be handed to a template: transformers lets only plain data through.)
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    " | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | replace('%m', '07')"
    " | replace('%Y', '2024') | replace('%y', '24') | replace('%a', 'Fri')"
    " | replace('%A', 'Friday') | replace('%H', '12') | replace('%M', '00')"
    " | replace('%S', '00') }}{% endmacro %}{{ '' }}"
)

_CHATML_END = "<|im_end|>"
_ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names for them.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row's text. `has_loss` is true for what the model is trained to write."""

    text: str
    has_loss: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text.

    `question` is the raw prompt without any template: the value of the prompt's only field, the
    values one below the other where it has several, a chat's first user turn. `prompt` and
    `response` are the templated prompt and the raw response of the last turn with loss.
    """

    segments: tuple[Segment, ...]
    question: str
    prompt: str
    response: str


# ---------------------------------------------------------------------------- text in braces


@lru_cache(maxsize=256)
def _pieces(text: str) -> tuple[tuple[str, str | None, bool], ...]:
    """The text as (literal before, field after it, whether that field may be missing)."""
    pieces: list[tuple[str, str | None, bool]] = []
    literal = ""
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+", text):
        part = match.group()
        if part in ("{{", "}}"):
            literal += part[0]
        elif match.group(1) is not None:
            name = match.group(1)
            pieces.append((literal, name.removesuffix("?"), name.endswith("?")))
            literal = ""
        elif part in "{}":
            raise DataError(
                f"{text!r} has a single {part!r}; write a field as {{name}} "
                "and a brace that is meant as such twice: {{ or }}"
            )
        else:
            literal += part
    pieces.append((literal, None, False))
    return tuple(pieces)


def fields_of(text: str) -> tuple[str, ...]:
    """The fields that a prompt or response names: the text itself where it has no braces.

    Raises:
        DataError: a brace stands alone.
    """
    if "{" not in text and "}" not in text:
        return (text,)
    return tuple(name for _, name, _ in _pieces(text) if name is not None)


def fill(text: str, row: Row, *, where: str) -> str:
    """The text with every {field} replaced by the row's value.

    Plain substitution: what a value holds is never read as a template. `{{` and `}}` stand for
    braces. `{field?}` may be missing or empty; then the blank space before it goes too, so that
    "{instruction}\\n\\n{input?}" ends with the instruction where there is no input.

    Args:
        text: a template in braces.
        row: the fields.
        where: names the row in errors, such as "train.jsonl, row 3".

    Raises:
        DataError: a field that the row lacks or that holds no text, or a brace that stands alone.
    """
    filled = ""
    for literal, name, optional in _pieces(text):
        if name is None:
            filled += literal
        elif optional and row.get(name) in (None, ""):
            filled += literal.rstrip()
        else:
            filled += literal + value_of(row, name, where=where)
    return filled


def value_of(row: Row, name: str, *, where: str) -> str:
    """The field's value as text; numbers are written as Python writes them.

    Raises:
        DataError: the row has no such field, or the field holds no text.
    """
    value = _present(row, name, where=where)
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    kind = "null" if value is None else f"a {type(value).__name__}"
    raise DataError(f"{where}: field {name!r} is {kind}; give a text, or leave the row out")


def _present(row: Row, name: str, *, where: str) -> Any:
    if name not in row:
        near = difflib.get_close_matches(name, list(row), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        there = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where} has no field {name!r}; its fields are {there}{hint}")
    return row[name]


def _value(text: str, row: Row, *, where: str) -> str:
    """A prompt or response: a field's name, or a template in braces."""
    if "{" in text or "}" in text:
        return fill(text, row, where=where)
    return value_of(row, text, where=where)


# ---------------------------------------------------------------------------- rows and prompts


def render_rows(
    rows: Sequence[Row], data: Data, *, tokenizer: "PreTrainedTokenizerBase", source: str
) -> list[Rendered]:
    """The rows of a source as text, as the study's `data` section says.

    Args:
        rows: what `sources.read_rows` gives.
        data: the study's section.
        tokenizer: the model's; only its special tokens and its chat template are used.
        source: names the source in errors.

    Raises:
        DataError: a field is missing or holds no text, the messages are no chat, or the tokenizer's
            chat template cannot render them.
    """
    chats = _chats(data.template, tokenizer)
    return [
        _render(row, data, chats=chats, where=f"{source}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]


def _render(row: Row, data: Data, *, chats: "_Chats", where: str) -> Rendered:
    if data.messages is not None:
        value = _present(row, data.messages, where=where)
        messages = to_messages(value, where=f"{where}: field {data.messages!r}")
        return _render_chat(messages, suffix=data.suffix, chats=chats, where=where)
    assert data.prompt is not None  # the schema: prompt and response, or messages
    assert data.response is not None
    prompt = _value(data.prompt, row, where=where)
    response = _value(data.response, row, where=where)
    names = fields_of(data.prompt)
    question = "\n".join(str(row[name]) for name in names if row.get(name) is not None)
    if data.template in ("chat", "chatml"):
        chat = (Message("user", prompt), Message("assistant", response))
        rendered = _render_chat(chat, suffix=data.suffix, chats=chats, where=where)
        return Rendered(rendered.segments, question, rendered.prompt, response)
    templated = _around(prompt, data.template)
    segments = (Segment(templated, False), Segment(response + data.suffix, True))
    return Rendered(segments, question, templated, response)


def prompt_for(
    question: str,
    data: Data,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    template: str | None = None,
) -> str:
    """The templated prompt for a question of a test set, as the rows of `data` have theirs.

    A prompt that is a field, or a template with one field, takes the question in that field's
    place, whatever the field is called. Its tokens are those of `encode.encode_prompts` for the
    same template.

    Args:
        question: the raw question.
        data: the study's section.
        tokenizer: the model's; only a chat needs it.
        template: a task's own decoding prompt, a text with {prompt}: it takes the raw question and
            stands in the place of the study's prompt and template.

    Raises:
        DataError: the prompt is made of several fields, so that one question does not fill it.
    """
    if template is not None:
        return _around(question, template)
    prompt = question
    if data.prompt is not None and ("{" in data.prompt or "}" in data.prompt):
        names = set(fields_of(data.prompt))
        if len(names) != 1:
            raise DataError(
                f"prompt {data.prompt!r} is made of {len(names)} fields and a test question is "
                "one; give the task a prompt of its own, a text with {prompt}"
            )
        prompt = fill(data.prompt, {names.pop(): question}, where="the test question")
    if data.template in ("chat", "chatml"):
        assert tokenizer is not None, "a chat's prompts are the tokenizer's to write"
        chats = _chats(data.template, tokenizer)
        turn = (Message("user", prompt),)
        return _chat_text(turn, chats, generation_prompt=True, where="the test question")
    return _around(prompt, data.template)


def writes_own_special_tokens(template: str) -> bool:
    """Whether the template's text holds BOS itself, so that tokenisation must not add it."""
    return template == "chat"


def ends_its_turns(template: str) -> bool:
    """Whether the template ends a response by itself, where it has a token for it."""
    return template in ("chat", "chatml")


def _around(prompt: str, template: str) -> str:
    if template == "plain":
        return prompt
    text = ALPACA if template == "alpaca" else template
    return fill(text, {"prompt": prompt}, where=f"template {text!r}")


# ---------------------------------------------------------------------------- chats


@dataclass(frozen=True, slots=True)
class _Chats:
    """What rendering a chat needs: the tokenizer and its chat template, None for ChatML, and a
    pattern of the special tokens.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str | None
    special: str


def _chats(template: str, tokenizer: "PreTrainedTokenizerBase") -> _Chats:
    chat_template = None
    if template == "chat":
        if tokenizer.chat_template is None:
            raise DataError(
                "template: chat needs a tokenizer with a chat template, and this model's has none; "
                "use template: chatml, alpaca or plain"
            )
        chat_template = tokenizer.get_chat_template()
        if "strftime_now" in chat_template:
            chat_template = _FIXED_DATE + chat_template
    return _Chats(tokenizer, chat_template, _special_pattern(tokenizer))


def to_messages(value: Any, *, where: str) -> tuple[Message, ...]:
    """A chat from a list of {role, content}, ShareGPT's {from, value}, or the JSON text of either.

    Contents given as a list of text parts are joined.

    Raises:
        DataError: it is no such list, or a role is unknown, or a content is no text.
    """
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is a text that is no JSON list of messages") from error
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where} is no list of messages such as [{{role: user, content: ...}}]")
    messages: list[Message] = []
    for number, item in enumerate(cast("Sequence[Any]", value), start=1):
        at = f"{where}, message {number}"
        if not isinstance(item, Mapping):
            raise DataError(f"{at} is no object; expected {{role: ..., content: ...}}")
        turn = cast("Mapping[str, Any]", item)
        if "role" in turn:
            role, content = turn["role"], turn.get("content")
        elif "from" in turn:
            role, content = turn["from"], turn.get("value")
        else:
            raise DataError(f"{at} has keys {', '.join(turn)}; expected role and content")
        role = _SHAREGPT_ROLES.get(role, role)
        if role not in _ROLES:
            raise DataError(f"{at} has role {role!r}; expected one of {', '.join(_ROLES)}")
        if turn.get("tool_calls"):
            raise DataError(f"{at} holds tool calls, which are not supported; leave the row out")
        messages.append(Message(role, _content(content, where=at)))
    return tuple(messages)


def _content(content: Any, *, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]  # pyright: ignore[reportUnknownVariableType]
        if all(isinstance(text, str) for text in texts):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            return "".join(cast("list[str]", texts))
    raise DataError(f"{where} has a content that is no text")


def _render_chat(
    messages: Sequence[Message], *, suffix: str, chats: _Chats, where: str
) -> Rendered:
    """Cut a chat's text into segments, loss on the assistant's turns and what ends them.

    With P the text before a turn (generation prompt included) and F the text through it, both must
    begin the text of the whole chat; F is needed only through the first special token after the
    content, because some templates write EOS after the last turn alone (Phi-3).
    """
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise DataError(f"{where}: the chat has no assistant turn, so nothing to learn")
    messages = [
        Message(m.role, m.content + suffix) if m.role == "assistant" else m for m in messages
    ][: turns[-1] + 1]  # what comes after the last assistant turn cannot move any loss

    def text(number: int, *, generation_prompt: bool) -> str:
        return _chat_text(
            messages[:number], chats, generation_prompt=generation_prompt, where=where
        )

    whole = text(len(messages), generation_prompt=False)
    segments: list[Segment] = []
    done = 0
    for index in turns:
        before = text(index, generation_prompt=True)
        is_last = index == turns[-1]
        through = whole if is_last else text(index + 1, generation_prompt=False)
        if not (through.startswith(before) and whole.startswith(before)) or len(before) < done:
            raise _unstable(turn=index + 1, where=where)
        added = through[len(before) :]
        end = _turn_end(added, special=chats.special, last=is_last)
        if not whole.startswith(added[:end], len(before)):
            raise _unstable(turn=index + 1, where=where)
        if suffix and messages[index].content not in added:
            raise DataError(
                f"{where}: the chat template drops the suffix {suffix!r}; leave suffix out"
            )
        segments += [Segment(whole[done : len(before)], False), Segment(added[:end], True)]
        done = len(before) + end
    prompt = whole[: done - len(segments[-1].text)]
    response = messages[turns[-1]].content.removesuffix(suffix)
    question = next((m.content for m in messages if m.role == "user"), "")
    return Rendered(tuple(segments), question, prompt, response)


def _unstable(*, turn: int, where: str) -> DataError:
    return DataError(
        f"{where}: the chat template renders message {turn} in another way once later messages "
        "follow, so a model would learn text that it never has to write; use template: chatml, or "
        "conversations of one answer"
    )


def _turn_end(added: str, *, special: str, last: bool) -> int:
    """Where the loss of a turn's text ends: behind the special tokens that close it.

    That is the first of the run of special tokens at the end; of the last turn all of them, because
    a model that stops at EOS alone has to learn that EOS too. White space behind them has no loss.
    A template that closes its turns with no special token keeps its text whole.
    """
    run = re.search(rf"(?:\s*(?:{special}))+\s*$", added)
    if run is None:
        return len(added)
    if last:
        return run.start() + len(run.group().rstrip())
    first = re.match(rf"\s*(?:{special})", run.group())
    assert first is not None  # the run is made of them
    return run.start() + first.end()


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The tokenizer's special tokens and their ids."""
    known = {
        added.content: index
        for index, added in tokenizer.added_tokens_decoder.items()
        if added.special
    }
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return known | dict(named)


def _special_pattern(tokenizer: "PreTrainedTokenizerBase") -> str:
    # ChatML's end counts even where the vocabulary lacks it: the text must be cut behind it.
    longest_first = sorted({*special_tokens(tokenizer), _CHATML_END}, key=len, reverse=True)
    return "|".join(re.escape(token) for token in longest_first)


def _chat_text(
    messages: Sequence[Message], chats: _Chats, *, generation_prompt: bool, where: str
) -> str:
    if chats.chat_template is None:
        turns = [f"<|im_start|>{m.role}\n{m.content}{_CHATML_END}\n" for m in messages]
        return "".join(turns) + ("<|im_start|>assistant\n" if generation_prompt else "")
    try:
        text = chats.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=chats.chat_template,
        )
    except (TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
        raise DataError(
            f"{where}: the tokenizer's chat template refuses this conversation ({error}); "
            "use template: chatml, or leave the row out"
        ) from error
    return cast("str", text)

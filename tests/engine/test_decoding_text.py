"""What ends an answer, told token by token, against the whole text decoded anew at every token."""

from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from loratune.engine.decoding_text import (
    ENDS,
    HARMLESS,
    MAY_STOP,
    SILENT,
    Ends,
    answer_of,
    cut_at,
    decoded,
)
from tiny_models import EOS_ID, tiny_tokenizer

TEXT = (
    "Question: how many \u00e9t\u00e9s are there?\n\nAnswer: \u4f60\u597d 12 + 30 = 42\n### 42\n"
    "def solve(x):\n    return x  # caf\u00e9 \U0001f600\U0001f601\n\nQuestion: "
)


def byte_level() -> PreTrainedTokenizerFast:
    """Merged tokens of several characters, and characters of several tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.replace("\U0001f601", "")] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is part of a word, the first is left out, unknown characters are
    bytes."""
    pieces = ["\u2581", "\u2581the", "the", "e", "a", "\u2581a", "\n", ":", "\u2581Question", "?"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {"bytes": byte_level(), "fallback": byte_fallback(), "characters": tiny_tokenizer()}
STOPS = [
    ("\n\n",),
    ("Question:", "\n###"),
    (" a", "?", "the e"),
    ("\u597d", "\U0001f600"),
    ("\u00e9",),
    (" ",),
]


def stops_at(ends: Ends, tokens: Sequence[int]) -> int | None:
    """After how many tokens: as the decoder asks."""
    for at, token in enumerate(tokens):
        (kind,) = ends.kinds(np.array([token]))
        if kind == ENDS or (kind == MAY_STOP and ends.is_stopped(tokens[: at + 1])):
            return at + 1
    return None


def stops_by_text(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stop: Sequence[str]
) -> int | None:
    texts = (decoded(tokenizer, tokens[: at + 1]) for at in range(len(tokens)))
    return next((at + 1 for at, text in enumerate(texts) if any(s in text for s in stop)), None)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stop", STOPS)
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(
    name: str, stop: tuple[str, ...]
):
    tokenizer = TOKENIZERS[name]
    generator = np.random.default_rng(0)
    # Random tokens, and a real text cut anywhere with random tokens in it.
    text = tokenizer.encode(TEXT, add_special_tokens=False)
    rows = [generator.integers(0, len(tokenizer), size=60).tolist() for _ in range(40)]
    for _ in range(40):
        begin = generator.integers(0, len(text))
        row = text[begin : begin + 60]
        row[generator.integers(0, len(row))] = int(generator.integers(0, len(tokenizer)))
        rows.append(row)
    ends = Ends(tokenizer, stop=stop, end_ids=(), vocab_size=len(tokenizer))
    found = [stops_at(ends, row) for row in rows]
    assert found == [stops_by_text(tokenizer, row, stop) for row in rows]


def test_stop_strings_are_found_in_real_text():
    # The property above would hold of texts in which nothing ever stops.
    tokenizer = TOKENIZERS["bytes"]
    text = tokenizer.encode(TEXT, add_special_tokens=False)
    for stop in STOPS:
        ends = Ends(tokenizer, stop=stop, end_ids=(), vocab_size=len(tokenizer))
        assert stops_at(ends, text) is not None


@pytest.mark.parametrize("stop", STOPS[:2])
def test_few_tokens_are_looked_at_twice(stop: tuple[str, ...]):
    tokenizer = TOKENIZERS["characters"]
    ends = Ends(tokenizer, stop=stop, end_ids=(EOS_ID,), vocab_size=128)
    kinds = ends.kinds(np.arange(128))
    assert (kinds == MAY_STOP).sum() == len({one[-1] for one in stop})
    # Special tokens have no text, and there are more embeddings than tokens.
    assert kinds[EOS_ID] == ENDS
    assert kinds[0] == kinds[127] == SILENT
    assert (kinds == HARMLESS).sum() > 90


def test_without_stop_strings_end_tokens_alone_end_an_answer():
    ends = Ends(TOKENIZERS["characters"], stop=(), end_ids=(7, 9, 1000), vocab_size=128)
    kinds = ends.kinds(np.arange(128))
    assert np.flatnonzero(kinds == ENDS).tolist() == [7, 9]
    assert np.flatnonzero(kinds == MAY_STOP).tolist() == []


def test_the_text_is_cut_before_the_first_stop_string_and_has_no_end_token():
    tokenizer = TOKENIZERS["characters"]
    ids = tokenizer.encode("one two", add_special_tokens=False)
    answer = answer_of(tokenizer, [*ids, EOS_ID], stop=("two", "e "), end_ids=(2,), finished=True)
    assert (answer.text, answer.num_tokens, answer.finished) == ("on", 8, True)
    assert cut_at("one two", ()) == "one two"
    assert cut_at("one two", ("three",)) == "one two"

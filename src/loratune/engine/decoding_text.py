"""From generated tokens to an answer: what ends it, and which text it is.

A stop string may begin and end inside tokens, so only the text itself tells whether it is there;
but to decode a whole answer anew at every token takes longer than to make it. A token can complete
a stop string only if the string's last character comes from it. So one look at a table tells for
nearly all tokens that nothing has ended; for the others the end of the answer is decoded, and the
whole of it only where the stop string is found in that.

Characters of several bytes may be spread over tokens: a token whose own text is not whole is always
looked at.
"""

# transformers' tokenizers and configurations are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loratune.models.load import Base
from loratune.records import Answer

# A character has at most so many bytes, and each may be a token.
BYTES_OF_A_CHARACTER = 4
# What a decoder writes for bytes that are no whole character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# What a token may do to an answer; the first: not worked out yet.
_UNKNOWN, SILENT, HARMLESS, MAY_STOP, ENDS = range(5)


def answer_of(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    stop: Sequence[str],
    end_ids: Sequence[int],
    finished: bool,
) -> Answer:
    """The answer that these generated tokens are; none of them comes after its end."""
    # Not every end is a special token of the tokenizer, which decoding would leave out.
    text = decoded(tokenizer, [one for one in token_ids if one not in end_ids])
    return Answer(text=cut_at(text, stop), num_tokens=len(token_ids), finished=finished)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, special ones left out, spaces as they are."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string that is in it."""
    begins = [text.find(one) for one in stop if one in text]
    return text[: min(begins)] if begins else text


def end_ids_of(base: Base, given: Sequence[int]) -> tuple[int, ...]:
    """Every token that ends an answer: those given, the tokenizer's EOS and the model's."""
    ids = set(given)
    for one in (
        base.tokenizer.eos_token_id,
        base.model.config.get_text_config().eos_token_id,
        base.model.generation_config.eos_token_id,
    ):
        if isinstance(one, int):
            ids.add(one)
        elif one is not None:
            ids.update(int(token) for token in one)
    return tuple(sorted(ids))


class Ends:
    """What ends the answers of requests with the same stop strings and the same end tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str],
        end_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        """`vocab_size`: no generated token is larger; a model may embed more than are known."""
        self.stop = tuple(stop)
        self.end_ids = tuple(end_ids)
        self._tokenizer = tokenizer
        self._last = {one[-1] for one in self.stop}
        # As many tokens as a stop string and the one that completes it can consist of.
        longest = max((len(one) for one in self.stop), default=0)
        self._window = BYTES_OF_A_CHARACTER * (longest + 1)
        first = HARMLESS if not self.stop else _UNKNOWN
        self._kind_V = np.full(vocab_size, first, dtype=np.uint8)
        self._kind_V[[one for one in self.end_ids if one < vocab_size]] = ENDS
        # A token's text can depend on whether something stands before it.
        self._anchor = _anchor(tokenizer)
        self._anchor_text = decoded(tokenizer, self._anchor)

    def kinds(self, tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
        """SILENT, HARMLESS, MAY_STOP or ENDS for each token."""
        kinds = self._kind_V[tokens]
        if not kinds.all():
            for token in np.unique(tokens[kinds == _UNKNOWN]).tolist():
                self._kind_V[token] = self._kind_of(token)
            kinds = self._kind_V[tokens]
        return kinds

    def is_stopped(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of an answer whose last token is MAY_STOP holds a stop string."""
        kinds = self._kind_V
        tail = list[int]()
        for token in reversed(token_ids):
            if kinds[token] != SILENT:
                tail.append(token)
            if len(tail) == self._window:
                break
        if not self._holds_stop(decoded(self._tokenizer, tail[::-1])):
            return False
        # Cut within a character, the tail can begin with a text that the answer does not have.
        return self._holds_stop(decoded(self._tokenizer, token_ids))

    def _holds_stop(self, text: str) -> bool:
        return any(one in text for one in self.stop)

    def _kind_of(self, token: int) -> int:
        alone = decoded(self._tokenizer, [token])
        behind = decoded(self._tokenizer, [*self._anchor, token])
        if not behind.startswith(self._anchor_text):
            return MAY_STOP
        text = alone + behind[len(self._anchor_text) :]
        if not text:
            return SILENT
        may_stop = REPLACEMENT in text or not self._last.isdisjoint(text)
        return MAY_STOP if may_stop else HARMLESS


def _anchor(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text that is whole and no special token, if the tokenizer has such."""
    ids: list[int] = tokenizer.encode("a", add_special_tokens=False)
    return ids

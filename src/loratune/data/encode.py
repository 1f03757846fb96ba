"""Rendered rows as token rows.

The prompt is tokenised with the tokenizer's own special tokens (a BOS where it adds one at the
start, never an EOS), every later segment without any, and the id lists are joined; then comes EOS.
So a prompt has the same tokens in training and when an answer is asked for, and no token straddles
the place where the answer begins. A tokenizer's chat template writes BOS by itself, so nothing is
added to it; and no EOS follows a chat that its template has already ended with a special token.
"""
# transformers' tokenizers are only partly annotated.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from loratune.data.rows import EncodedRows, concatenate, lay_end_to_end
from loratune.data.templates import (
    Rendered,
    ends_its_turns,
    special_tokens,
    writes_own_special_tokens,
)
from loratune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows tokenised in one call: enough to keep every core busy, few enough that the lists of Python
# integers stay small beside the arrays that they become.
_CHUNK_ROWS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSource:
    """All rows of a source as tokens, none left out.

    `lengths` are the rows' whole lengths; rows longer than `max_tokens` are cut to it in `rows`.
    """

    rows: EncodedRows
    lengths: NDArray[np.int64]


def encode(
    rendered: Sequence[Rendered],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    max_tokens: int,
) -> EncodedSource:
    """Tokenise rendered rows; rows longer than `max_tokens` lose their end.

    The first token of a row never carries loss: nothing predicts it.

    Raises:
        DataError: the tokenizer has no EOS.
    """
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise DataError("the tokenizer has no EOS token, so no answer could end; set eos_token")
    closing_ids = (
        set(special_tokens(tokenizer).values()) if ends_its_turns(template) else set[int]()
    )
    parts: list[EncodedRows] = []
    lengths: list[int] = []
    for begin in range(0, len(rendered), _CHUNK_ROWS):
        chunk = rendered[begin : begin + _CHUNK_ROWS]
        firsts = encode_prompts(
            [row.segments[0].text for row in chunk], tokenizer=tokenizer, template=template
        )
        laters = iter(
            _tokenise(
                [segment.text for row in chunk for segment in row.segments[1:]],
                tokenizer=tokenizer,
                special=False,
            )
        )
        ids: list[list[int]] = []
        masks: list[list[bool]] = []
        for row, first in zip(chunk, firsts, strict=True):
            pieces = [first, *(next(laters) for _ in row.segments[1:])]
            row_ids = list(chain.from_iterable(pieces))
            mask = list(
                chain.from_iterable(
                    [segment.has_loss] * len(piece)
                    for segment, piece in zip(row.segments, pieces, strict=True)
                )
            )
            if not row_ids or row_ids[-1] not in closing_ids:
                row_ids.append(eos_id)
                mask.append(True)
            mask[0] = False
            lengths.append(len(row_ids))
            ids.append(row_ids[:max_tokens])
            masks.append(mask[:max_tokens])
        parts.append(lay_end_to_end(ids, masks))
    return EncodedSource(concatenate(parts), np.array(lengths, dtype=np.int64))


def encode_prompts(
    prompts: Sequence[str], *, tokenizer: "PreTrainedTokenizerBase", template: str
) -> list[list[int]]:
    """The tokens of templated prompts, as they begin the training rows of the same template."""
    if writes_own_special_tokens(template):
        return _tokenise(prompts, tokenizer=tokenizer, special=False)
    ids = _tokenise(prompts, tokenizer=tokenizer, special=True)
    num_closing = _num_closing_tokens(tokenizer)
    return [row[: len(row) - num_closing] for row in ids]


def _num_closing_tokens(tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many special tokens the tokenizer adds at the end of a text: 1 where it adds an EOS."""
    (bare,) = _tokenise(["a"], tokenizer=tokenizer, special=False)
    (full,) = _tokenise(["a"], tokenizer=tokenizer, special=True)
    for num_opening in range(len(full) - len(bare) + 1):
        if full[num_opening : num_opening + len(bare)] == bare:
            return len(full) - len(bare) - num_opening
    raise DataError(
        "the tokenizer tokenises a text in another way when it adds its special tokens; "
        "loratune cannot mask such prompts"
    )


def _tokenise(
    texts: Sequence[str], *, tokenizer: "PreTrainedTokenizerBase", special: bool
) -> list[list[int]]:
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # rows longer than the model are counted, not warned about
    )
    return cast("list[list[int]]", encoding["input_ids"])

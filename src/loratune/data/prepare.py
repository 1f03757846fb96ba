"""From the study's `data` section to token rows, with an account of every row.

Order of events: read, render, tokenise, drop or cut what is too long, hold validation rows out,
choose the first or random N of what remains. Reading and tokenising is done once for all N.
Nothing here depends on a trial's seed, and nothing here knows torch.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loratune.data.encode import EncodedSource, encode
from loratune.data.rows import EncodedRows
from loratune.data.sources import read_rows, source_name
from loratune.data.split import choose_rows, hold_out, normalise
from loratune.data.templates import Rendered, render_rows, value_of
from loratune.errors import DataError
from loratune.records import DataFacts, DataSummary
from loratune.study.schema import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FINGERPRINT_DOMAIN = b"loratune data 1\0"


@dataclass(frozen=True, slots=True)
class Example:
    """A validation row to ask the model: its templated prompt, that prompt's tokens as the row
    begins with them, the reference response, and the raw prompt without any template.
    """

    prompt_text: str
    prompt_ids: tuple[int, ...]
    response_text: str
    question: str


@dataclass(frozen=True, slots=True, eq=False)
class PreparedData:
    """One choice of N, ready to train: rows, validation, and what is to be said about them.

    `end_ids` are the tokens that end an answer: EOS, and whatever the chat template ends it with.
    """

    train: EncodedRows
    validation: EncodedRows | None
    validation_examples: tuple[Example, ...]
    end_ids: tuple[int, ...]
    facts: DataFacts
    summary: DataSummary


@dataclass(frozen=True, slots=True, eq=False)
class PreparedSource:
    """A data section, read and tokenised; `choose` takes the N rows of a trial from it."""

    data: Data
    num_source_rows: int
    num_dropped_too_long: int
    num_truncated: int
    num_validation_dropped: int
    remaining: EncodedRows
    questions: tuple[str, ...] = field(repr=False)
    validation: EncodedRows | None
    validation_examples: tuple[Example, ...] = field(repr=False)
    validation_questions: frozenset[str] = field(repr=False)
    num_validation_groups: int
    validation_sources: tuple[int, ...] = field(repr=False)
    end_ids: tuple[int, ...]
    test_questions: Mapping[str, frozenset[str]] = field(repr=False)

    def choose(self, rows: int | None) -> PreparedData:
        """The first or random N training rows, as the study says; None: all that remain.

        Raises:
            DataError: N is more than what remains.
        """
        chosen = choose_rows(len(self.remaining), rows=rows, order=self.data.rows_order)
        train = self.remaining.take(chosen)
        questions = [self.questions[row] for row in _positions(chosen)]
        num_validation_rows = 0 if self.validation is None else len(self.validation)
        lengths = train.lengths
        held_from_train = self.data.validation is not None and self.data.validation.file is None
        facts = DataFacts(
            fingerprint=fingerprint(train, self.validation),
            num_train_rows=len(train),
            num_validation_rows=num_validation_rows,
            num_tokens=int(lengths.sum()),
            sum_squared_tokens=int((lengths**2).sum()),
            num_target_tokens=int(train.is_target.sum()),
            max_row_tokens=int(lengths.max()),
        )
        summary = DataSummary(
            source=source_name(self.data.train),
            num_source_rows=self.num_source_rows,
            num_dropped_too_long=self.num_dropped_too_long,
            num_truncated=self.num_truncated,
            num_validation_rows=num_validation_rows,
            num_validation_groups=self.num_validation_groups,
            num_left_over=self.num_source_rows
            - self.num_dropped_too_long
            - (num_validation_rows if held_from_train else 0)
            - len(train),
            num_train_rows=len(train),
            num_duplicate_rows=len(questions) - len(set(questions)),
            num_in_test=tuple(
                (task, sum(question in asked for question in questions))
                for task, asked in self.test_questions.items()
            ),
            num_in_validation=sum(one in self.validation_questions for one in questions),
            num_validation_dropped=self.num_validation_dropped,
            validation_sources=self.validation_sources,
        )
        return PreparedData(
            train, self.validation, self.validation_examples, self.end_ids, facts, summary
        )


def prepare(
    data: Data,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    test_questions: Mapping[str, Sequence[str]] | None = None,
) -> PreparedSource:
    """Read, template, tokenise and split the rows of a study's data section.

    Args:
        data: the section.
        tokenizer: the base model's.
        folder: what relative paths are relative to: the study file's folder.
        test_questions: each task's raw questions, to find training rows that stand in a test.

    Raises:
        DataError: rows that cannot be read or rendered, too few rows for the hold-out, or none
            left to train on.
    """
    kept = _kept(data.train, data, tokenizer=tokenizer, folder=folder)
    if not len(kept.encoded):
        raise DataError(
            f"{source_name(data.train)}: none of {kept.num_source_rows} rows has a response within "
            f"max_tokens={data.max_tokens}; raise max_tokens"
        )
    questions = [normalise(rendered.question) for rendered in kept.rendered]
    everything: NDArray[np.int64] = np.arange(len(questions), dtype=np.int64)
    remaining = everything
    held = everything[:0]
    num_groups = 0
    held_groups = list[str]()
    validation: _Kept | None = None
    if data.validation is not None and data.validation.file is not None:
        validation = _kept(data.validation.file, data, tokenizer=tokenizer, folder=folder)
        if not len(validation.encoded):
            raise DataError(
                f"{source_name(data.validation.file)}: none of {validation.num_source_rows} "
                f"validation rows has a response within max_tokens={data.max_tokens}; "
                "raise max_tokens"
            )
        held_groups = [normalise(rendered.question) for rendered in validation.rendered]
        num_groups = len(set(held_groups))
    elif data.validation is not None and data.validation.rows is not None:
        groups = questions
        if data.validation.group_by is not None:
            groups = [
                value_of(row, data.validation.group_by, where=f"{where} (validation.group_by)")
                for row, where in zip(kept.rows, kept.names, strict=True)
            ]
        split = hold_out(groups, num_rows=data.validation.rows)
        remaining, held, num_groups = split.remaining, split.held_out, split.num_groups
        validation = _part(kept, held)
        held_groups = [groups[row] for row in _positions(held)]
    return PreparedSource(
        data=data,
        num_source_rows=kept.num_source_rows,
        num_dropped_too_long=kept.num_dropped,
        num_truncated=kept.num_truncated + (0 if validation is None else validation.num_truncated),
        num_validation_dropped=0 if validation is None else validation.num_dropped,
        remaining=kept.encoded.take(remaining),
        questions=tuple(questions[row] for row in _positions(remaining)),
        validation=None if validation is None else validation.encoded,
        validation_examples=() if validation is None else _examples(validation),
        validation_questions=frozenset(
            () if validation is None else (normalise(one.question) for one in validation.rendered)
        ),
        num_validation_groups=num_groups,
        validation_sources=_numbered(held_groups),
        end_ids=kept.end_ids,
        test_questions={
            task: frozenset(map(normalise, asked)) for task, asked in (test_questions or {}).items()
        },
    )


def _numbered(groups: Sequence[str]) -> tuple[int, ...]:
    """Each row's group as a number, in order of first appearance; empty where all are single."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return () if len(numbers) == len(groups) else tuple(numbers[group] for group in groups)


def fingerprint(train: EncodedRows, validation: EncodedRows | None) -> str:
    """A hash of the exact token ids, row boundaries and loss masks of both sets of rows."""
    digest = hashlib.sha256(_FINGERPRINT_DOMAIN)
    for rows in (train, validation):
        if rows is None:
            digest.update(b"none\0")
            continue
        digest.update(f"{len(rows)} {len(rows.input_ids)}\0".encode())
        digest.update(rows.offsets.astype("<i8").tobytes())
        digest.update(rows.input_ids.astype("<i4").tobytes())
        digest.update(rows.is_target.astype("u1").tobytes())
    return f"data-{digest.hexdigest()}"


def turn_ends(data: Data, *, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The tokens that end an answer under the template, as `PreparedData.end_ids`, without rows."""
    question, response = "question", "response"
    row = {question: "a", response: "b"}
    plain = Data(
        train=data.train,
        prompt=question,
        response=response,
        template=data.template,
        max_tokens=data.max_tokens,
    )
    rendered = render_rows([row], plain, tokenizer=tokenizer, source="the template")
    encoded = encode(rendered, tokenizer=tokenizer, template=data.template, max_tokens=sys.maxsize)
    is_long = np.zeros(1, dtype=np.bool_)
    return _end_ids(encoded, is_long, tokenizer=tokenizer)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """The rows of one source that can train or validate: those with a target within max_tokens.

    The lists run in parallel; `names` name the rows in errors.
    """

    num_source_rows: int
    num_dropped: int
    num_truncated: int
    rows: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    rendered: Sequence[Rendered]
    encoded: EncodedRows
    end_ids: tuple[int, ...]


def _kept(
    source: Source, data: Data, *, tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> _Kept:
    rows = read_rows(source, folder=folder)
    name = source_name(source)
    rendered = render_rows(rows, data, tokenizer=tokenizer, source=name)
    encoded = encode(
        rendered, tokenizer=tokenizer, template=data.template, max_tokens=data.max_tokens
    )
    is_long = encoded.lengths > data.max_tokens
    is_kept = _has_target(encoded.rows)
    if data.too_long == "drop":
        is_kept &= ~is_long
    kept = np.flatnonzero(is_kept)
    positions = _positions(kept)
    return _Kept(
        num_source_rows=len(rows),
        num_dropped=len(rows) - len(kept),
        num_truncated=int((is_kept & is_long).sum()),
        rows=[rows[row] for row in positions],
        names=[f"{name}, row {row + 1}" for row in positions],
        rendered=[rendered[row] for row in positions],
        encoded=encoded.rows.take(kept),
        end_ids=_end_ids(encoded, is_long, tokenizer=tokenizer),
    )


def _positions(rows: NDArray[np.int64]) -> list[int]:
    return [int(row) for row in rows]


def _has_target(rows: EncodedRows) -> NDArray[np.bool_]:
    """Whether any token of a row carries loss, bool[num_rows]."""
    before = np.concatenate([[0], np.cumsum(rows.is_target)])
    return before[rows.offsets[1:]] > before[rows.offsets[:-1]]


def _end_ids(
    encoded: EncodedSource, is_long: NDArray[np.bool_], *, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...]:
    last = encoded.rows.input_ids[encoded.rows.offsets[1:] - 1][~is_long]
    eos_id = tokenizer.eos_token_id
    assert isinstance(eos_id, int)  # encode has refused anything else
    return tuple(sorted({eos_id, *(int(token) for token in np.unique(last))}))


def _part(kept: _Kept, rows: NDArray[np.int64]) -> _Kept:
    """The held-out part of a source. Its counts are zero: they are the source's."""
    positions = _positions(rows)
    return _Kept(
        num_source_rows=len(rows),
        num_dropped=0,
        num_truncated=0,
        rows=[kept.rows[row] for row in positions],
        names=[kept.names[row] for row in positions],
        rendered=[kept.rendered[row] for row in positions],
        encoded=kept.encoded.take(rows),
        end_ids=kept.end_ids,
    )


def _examples(kept: _Kept) -> tuple[Example, ...]:
    """What the model is asked in each row: the last answer, given all that stands before it."""
    examples: list[Example] = []
    for index, rendered in enumerate(kept.rendered):
        ids, is_target = kept.encoded.row(index)
        # The last stretch of loss is the last answer; what comes before it is its prompt.
        last = int(np.flatnonzero(is_target)[-1])
        before = np.flatnonzero(~is_target[: last + 1])
        prompt_ids = ids[: int(before[-1]) + 1]
        examples.append(
            Example(
                rendered.prompt,
                tuple(int(token) for token in prompt_ids),
                rendered.response,
                rendered.question,
            )
        )
    return tuple(examples)

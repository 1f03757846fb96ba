"""The shipped fine-tuning task, `demo:task`: two-step word problems with worked answers.

Rows are made from a seed and never stored, so there is any number of them. The demo models were
pretrained on something else (tools/demo_corpus.py): number facts, one-step stories with other verbs
and other sentences, plain text that says of the task's verbs whether they leave more or less, and
never a worked answer or "The answer is:". Fine-tuning has to teach what to compute with these
verbs, the second step and the form of the answer. Some choices of words in an answer are free and
drawn at random, as in answers that people or large models write; that part of the loss
cannot be learned away, and it is what keeps the gradients of small batches noisy to the end.

This file knows nothing of models, tokenizers or prompts, and needs the standard library alone.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Literal, TypeVar

from loratune.errors import DataError

DEFAULT_SEED = 0
DEFAULT_NUM_ROWS = {"train": 4096, "test": 512}
"""What the source `demo:task` stands for: these many rows of DEFAULT_SEED."""

PROMPT = "Question: {question}\nAnswer:"
"""The study file's `prompt:` for this task; with `response: answer` and `template: plain`."""

LARGEST_NUMBER = 30
"""No number in a problem, given or computed, is larger; the models know the facts up to here."""

NAMES = (
    "Ann", "Ben", "Cal", "Dora", "Eli", "Fay", "Gus", "Hana",
    "Ivo", "Jill", "Kim", "Leo", "Mia", "Ned", "Ola", "Pam",
)  # fmt: skip
THINGS = (
    "apples", "plums", "shells", "coins", "cards", "stamps", "beads", "books",
    "pens", "marbles", "eggs", "nuts", "stones", "cups", "ribbons", "keys",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "baskets", "drawers")
GAIN_VERBS = ("collects", "receives", "earns", "borrows")
LOSS_VERBS = ("drops", "donates", "breaks", "returns")

_Item = TypeVar("_Item")


def generate_rows(
    num_rows: int, *, seed: int, split: Literal["train", "test"] = "train"
) -> list[dict[str, str]]:
    """Make `num_rows` rows, each with a `question` and an `answer` that ends "The answer is: n".

    Row i depends on `seed`, `split` and i alone, so a longer list begins with the shorter one. No
    question of one split, normalised, can come in the other one, whatever the seeds. Rows are
    independent draws: within a split a question may, rarely, come twice.

    Raises:
        DataError: `num_rows` is negative, or `split` is neither "train" nor "test".
    """
    if num_rows < 0:
        raise DataError(f"num_rows={num_rows} is negative; ask for 0 or more rows of demo:task")
    if split not in ("train", "test"):
        raise DataError(f"split={split!r} of demo:task does not exist; choose 'train' or 'test'")
    return [_draw_row(seed=seed, split=split, index=index) for index in range(num_rows)]


def split_of(question: str) -> Literal["train", "test"]:
    """The split to which a question belongs: a fifth of all questions, by hash, are for testing.

    Only letters and digits count, in lower case, so that two spellings of one question can never
    be on two sides.
    """
    normalised = "".join(c for c in question.lower() if c.isalnum())
    digest = hashlib.sha256(normalised.encode("utf-8")).digest()
    return "test" if digest[0] % 5 == 0 else "train"


def _draw_row(*, seed: int, split: str, index: int) -> dict[str, str]:
    # Only Random.random() is used, the one method whose numbers Python promises to keep.
    rng = random.Random(f"loratune demo:task {seed} {split} {index}")
    while True:
        question, first, second, result = _draw_problem(rng)
        if split_of(question) == split:
            return {"question": question, "answer": _answer(rng, first, second, result)}


def _draw_problem(rng: random.Random) -> tuple[str, str, str, int]:
    """A question, its two steps as equations, and its result."""
    kind = _below(rng, 4)
    if kind <= 1:
        return _change_change(rng)
    if kind == 2:
        return _groups_change(rng)
    return _compare_total(rng)


def _change_change(rng: random.Random) -> tuple[str, str, str, int]:
    name, thing = _pick(rng, NAMES), _pick(rng, THINGS)
    start = 2 + _below(rng, LARGEST_NUMBER - 2)
    phrase_1, step_1, middle = _draw_change(rng, start)
    phrase_2, step_2, result = _draw_change(rng, middle)
    question = _pick(
        rng,
        (
            f"{name} starts with {start} {thing}, {phrase_1} and then {phrase_2}. "
            f"How many {thing} does {name} end up with?",
            f"In the morning {name} has {start} {thing}. At noon {name} {phrase_1}, and at night "
            f"{name} {phrase_2}. What is the number of {thing} now?",
            f"Out of {start} {thing}, {name} first {phrase_1}. Later {name} {phrase_2}. "
            f"Find how many {thing} there are at the end.",
        ),
    )
    return question, step_1, step_2, result


def _groups_change(rng: random.Random) -> tuple[str, str, str, int]:
    name, thing, container = _pick(rng, NAMES), _pick(rng, THINGS), _pick(rng, CONTAINERS)
    groups = 2 + _below(rng, 4)
    each = 2 + _below(rng, 5)
    middle = groups * each
    phrase, step_2, result = _draw_change(rng, middle)
    question = _pick(
        rng,
        (
            f"{name} fills {groups} {container} with {each} {thing} in each, then {phrase}. "
            f"How many {thing} does {name} end up with?",
            f"With {each} {thing} in every one of {groups} {container}, {name} {phrase}. "
            f"What is the number of {thing} now?",
        ),
    )
    return question, f"{groups} * {each} = {middle}", step_2, result


def _compare_total(rng: random.Random) -> tuple[str, str, str, int]:
    name, thing = _pick(rng, NAMES), _pick(rng, THINGS)
    other = _pick(rng, [n for n in NAMES if n != name])
    first = 2 + _below(rng, LARGEST_NUMBER // 2 - 2)
    if rng.random() < 0.5:
        by = 1 + _below(rng, LARGEST_NUMBER - 2 * first)
        second = first + by
        step_1 = f"{first} + {by} = {second}"
        relation = "above"
    else:
        by = 1 + _below(rng, first - 1)
        second = first - by
        step_1 = f"{first} - {by} = {second}"
        relation = "below"
    total = first + second
    question = _pick(
        rng,
        (
            f"{name} counts {first} {thing}. The count of {other} is {by} {relation} that. "
            f"What is their sum?",
            f"The {thing} of {name} number {first}, and those of {other} are {by} {relation} that. "
            f"How many {thing} do both own?",
        ),
    )
    return question, step_1, f"{first} + {second} = {total}", total


def _draw_change(rng: random.Random, have: int) -> tuple[str, str, int]:
    """One change to `have` things: its words, its equation and what is there afterwards."""
    gain = rng.random() < 0.5
    if have >= LARGEST_NUMBER:
        gain = False
    if have <= 1:
        gain = True
    if gain:
        by = 1 + _below(rng, min(12, LARGEST_NUMBER - have))
        return f"{_pick(rng, GAIN_VERBS)} {by}", f"{have} + {by} = {have + by}", have + by
    by = 1 + _below(rng, min(12, have - 1))
    return f"{_pick(rng, LOSS_VERBS)} {by}", f"{have} - {by} = {have - by}", have - by


def _answer(rng: random.Random, first: str, second: str, result: int) -> str:
    worked = _pick(
        rng,
        (
            f"First {first}. Then {second}.",
            f"We compute {first}, so {second}.",
            f"Step 1: {first}. Step 2: {second}.",
        ),
    )
    return f"{worked} The answer is: {result}"


def _pick(rng: random.Random, items: Sequence[_Item]) -> _Item:
    return items[_below(rng, len(items))]


def _below(rng: random.Random, bound: int) -> int:
    """A whole number from 0 to bound - 1."""
    return int(rng.random() * bound)

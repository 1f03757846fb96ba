"""The synthetic corpus on which the demo models are pretrained: number facts, stories, plain text.

What is in it, and why: the facts that a word problem needs (sums, differences, products up to 30);
chains of two facts; short lists from which one entry is asked for, so that the models learn to look
a number up; one-step stories; sentences that say which verbs leave more and which leave fewer, as
any text would; and plain sentences, which also use the words of the fine-tuning task (all but "do")
so that no embedding is left untrained. What is not in it: the task's sentences, its verbs in
stories, two-step problems, worked answers, "The answer is:". tests/data/test_demo_task.py checks
that.

Everything is drawn from one seed by Random.random() alone, whose numbers Python promises to keep.
"""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from loratune.data.demo_task import (
    CONTAINERS,
    GAIN_VERBS,
    LARGEST_NUMBER,
    LOSS_VERBS,
    NAMES,
    THINGS,
)

_Item = TypeVar("_Item")

STORY_GAIN_VERBS = ("buys", "gets", "finds", "wins", "makes")
STORY_LOSS_VERBS = ("loses", "sells", "gives away", "uses", "eats")

_PEOPLE = (
    "farmer", "teacher", "baker", "sailor", "child", "singer", "doctor", "gardener", "painter",
    "driver", "nurse", "judge",
)  # fmt: skip
_ANIMALS = ("dog", "cat", "bird", "horse", "fox", "cow", "goat", "duck", "mouse", "bear")
_PLACES = (
    "river", "garden", "market", "school", "forest", "house", "harbor", "hill", "shop", "bridge",
    "tower", "kitchen", "window", "street", "field",
)  # fmt: skip
_QUALITIES = (
    "old", "small", "green", "quiet", "bright", "cold", "happy", "round", "new", "red", "large",
    "yellow", "strange", "gentle", "heavy",
)  # fmt: skip
_ACTIONS = (
    "walks", "runs", "sings", "sleeps", "waits", "looks", "works", "rests", "plays", "swims",
    "reads", "dances",
)  # fmt: skip
_TIMES = (
    "in the morning", "at noon", "at night", "in the evening", "every day", "later", "first", "now",
)  # fmt: skip


def generate_documents(num_documents: int, *, seed: int) -> list[str]:
    """Draw documents of one to eight sentences; a longer list begins with the shorter one."""
    rng = random.Random(f"loratune demo corpus {seed}")
    kinds: list[Callable[[random.Random], str]] = []
    for kind, weight in _MIXTURE.items():
        kinds.extend([kind] * weight)
    return [_pick(rng, kinds)(rng) for _ in range(num_documents)]


def _facts(rng: random.Random) -> str:
    return " ".join(_fact(rng) for _ in range(1 + _below(rng, 5)))


def _fact(rng: random.Random) -> str:
    kind = _below(rng, 10)
    if kind < 4:
        a = _below(rng, LARGEST_NUMBER + 1)
        b = _below(rng, LARGEST_NUMBER + 1 - a)
        return _pick(rng, _SUM_FORMS).format(a=a, b=b, c=a + b)
    if kind < 8:
        a = _below(rng, LARGEST_NUMBER + 1)
        b = _below(rng, a + 1)
        return _pick(rng, _DIFFERENCE_FORMS).format(a=a, b=b, c=a - b)
    if kind == 8:
        a = 1 + _below(rng, 10)
        b = 1 + _below(rng, LARGEST_NUMBER // a)
        return _pick(rng, _PRODUCT_FORMS).format(a=a, b=b, c=a * b)
    start = _below(rng, 95)
    return "Count: " + ", ".join(str(start + i) for i in range(2 + _below(rng, 4))) + "."


_SUM_FORMS = (
    "{a} + {b} = {c}.",
    "{a} + {b} = {c}.",
    "{a} plus {b} is {c}.",
    "The sum of {a} and {b} is {c}.",
    "{b} more than {a} is {c}.",
    "{b} more than {a}: {a} + {b} = {c}.",
    "Question: What is {a} + {b}?\nAnswer: {c}.",
)
_DIFFERENCE_FORMS = (
    "{a} - {b} = {c}.",
    "{a} - {b} = {c}.",
    "{a} minus {b} is {c}.",
    "{a} without {b} is {c}.",
    "{b} less than {a} is {c}.",
    "{b} less than {a}: {a} - {b} = {c}.",
    "Question: What is {a} - {b}?\nAnswer: {c}.",
)
_PRODUCT_FORMS = (
    "{a} * {b} = {c}.",
    "{a} * {b} = {c}.",
    "{a} times {b} is {c}.",
    "Question: What is {a} * {b}?\nAnswer: {c}.",
)


def _chain(rng: random.Random) -> str:
    """Two or three facts, each going on from the result of the one before."""
    have = 1 + _below(rng, LARGEST_NUMBER)
    link = _pick(rng, (". ", ", then ", " and "))
    parts: list[str] = []
    for _ in range(2 + _below(rng, 2)):
        step, have = _step(rng, have)
        parts.append(step)
    return link.join(parts) + "."


def _step(rng: random.Random, have: int) -> tuple[str, int]:
    if have < LARGEST_NUMBER and (have <= 1 or rng.random() < 0.5):
        by = 1 + _below(rng, LARGEST_NUMBER - have)
        return f"{have} + {by} = {have + by}", have + by
    by = 1 + _below(rng, have)
    return f"{have} - {by} = {have - by}", have - by


def _recall(rng: random.Random) -> str:
    """Two to four people with things; then one entry, or all of them, again."""
    entries: list[tuple[str, int, str]] = []
    for _ in range(2 + _below(rng, 3)):
        name = _pick(rng, [n for n in NAMES if n not in [e[0] for e in entries]])
        entries.append((name, _below(rng, LARGEST_NUMBER + 1), _pick(rng, THINGS)))
    sentences = [f"{name} has {number} {thing}." for name, number, thing in entries]
    told = " ".join(sentences)
    name, number, thing = _pick(rng, entries)
    form = _below(rng, 3)
    if form == 0:
        return f"{told}\nQuestion: How many {thing} does {name} have?\nAnswer: {number}."
    if form == 1:
        shuffled = [sentence for _, sentence in sorted((rng.random(), s) for s in sentences)]
        return f"{told} Again: {' '.join(shuffled)}"
    return f"{told} The {thing} of {name} are {number}."


def _story(rng: random.Random) -> str:
    """One person, one change, told in one of several ways; the result last.

    Sentences that have nothing to do with it may stand between, so that what matters has to be
    found by what it says, not by how far back it is.
    """
    name, thing = _pick(rng, NAMES), _pick(rng, THINGS)
    have = 1 + _below(rng, LARGEST_NUMBER)
    equation, now = _step(rng, have)
    verb = _pick(rng, STORY_GAIN_VERBS if now > have else STORY_LOSS_VERBS)
    by = abs(now - have)
    change = "more" if now > have else "less"
    aside = f" {_aside(rng)}" if rng.random() < 0.4 else ""
    told = _pick(
        rng,
        (
            f"{name} has {have} {thing}.{aside} {name} {verb} {by} {thing}.",
            f"{name} has {have} {thing} and {verb} {by}.{aside}",
            f"There are {have} {thing}.{aside} Then {name} {verb} {by} of them.",
            f"{name} {verb} {by} {thing}.{aside} Before that there are {have}.",
        ),
    )
    if rng.random() < 0.4:
        # The question inside, as in a book of exercises.
        ask = _pick(rng, (f"How many {thing} does {name} have?", f"How many {thing} are there?"))
        answer = _pick(rng, (f"{equation}.", f"{now}.", f"{by} {change}: {equation}."))
        return f"Question: {told} {ask}\nAnswer: {answer}"
    return told + _pick(
        rng,
        (
            f" {name} has {now} {thing}.",
            f" {equation}.",
            f" {equation}. So there are {now} {thing}.",
            f" That is {by} {change}: {equation}.",
            f"\nQuestion: How many {thing} does {name} have?\nAnswer: {now}.",
            f"\nQuestion: How many {thing} are there?\nAnswer: {equation}.",
        ),
    )


def _aside(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{_pick(rng, NAMES)} has {_below(rng, LARGEST_NUMBER + 1)} {_pick(rng, THINGS)}."
    who = f"{_pick(rng, _QUALITIES)} {_pick(rng, _PEOPLE + _ANIMALS)}"
    return f"The {who} {_pick(rng, _ACTIONS)} near the {_pick(rng, _PLACES)}."


def _groups(rng: random.Random) -> str:
    """Equal groups of things, and how many there are in all."""
    thing, container = _pick(rng, THINGS), _pick(rng, CONTAINERS)
    a = 2 + _below(rng, 8)
    b = 1 + _below(rng, LARGEST_NUMBER // a)
    told = _pick(
        rng,
        (
            f"There are {a} {container}. Each holds {b} {thing}.",
            f"{_pick(rng, NAMES)} has {a} {container} of {b} {thing}.",
        ),
    )
    return told + _pick(rng, (f" {a} * {b} = {a * b}.", f" In all there are {a * b} {thing}."))


def _meaning(rng: random.Random) -> str:
    """What the words of change and comparison mean: more or fewer, with nothing to compute."""
    sentences: list[str] = []
    for _ in range(1 + _below(rng, 3)):
        name, thing = _pick(rng, NAMES), _pick(rng, THINGS)
        by = 1 + _below(rng, 20)
        low = _below(rng, LARGEST_NUMBER)
        high = low + 1 + _below(rng, LARGEST_NUMBER - low)
        if rng.random() < 0.5:
            verb, change = _pick(rng, GAIN_VERBS + STORY_GAIN_VERBS), "more"
            compared = f"{high} is above {low}: it is {high - low} more."
        else:
            verb, change = _pick(rng, LOSS_VERBS + STORY_LOSS_VERBS), "less"
            compared = f"{low} is below {high}: it is {high - low} less."
        sentences.append(
            _pick(
                rng,
                (
                    f"{name} {verb} {thing}. Now {name} has {change}.",
                    f"When {name} {verb} {by} {thing}, there are {by} {change}.",
                    f"{name} {verb} {by}, that is {by} {change}.",
                    f"{name} has {change} {thing} when {name} {verb} some.",
                    compared,
                ),
            )
        )
    return " ".join(sentences)


def _plain_text(rng: random.Random) -> str:
    return " ".join(_sentence(rng) for _ in range(2 + _below(rng, 4)))


def _sentence(rng: random.Random) -> str:
    name, other, thing = _pick(rng, NAMES), _pick(rng, NAMES), _pick(rng, THINGS)
    subject = f"The {_pick(rng, _QUALITIES)} {_pick(rng, _PEOPLE + _ANIMALS)}"
    place, time = _pick(rng, _PLACES), _pick(rng, _TIMES)
    verb = _pick(rng, GAIN_VERBS + LOSS_VERBS + STORY_GAIN_VERBS + STORY_LOSS_VERBS)
    return _pick(
        rng,
        (
            f"{subject} {_pick(rng, _ACTIONS)} near the {place} {time}.",
            f"{name} {verb} {thing} in the {place} {time}.",
            f"{time.capitalize()} {name} {verb} the {_pick(rng, _QUALITIES)} {thing}.",
            f"{name} and {other} own {thing}, and both {_pick(rng, ('sing', 'wait', 'play'))}.",
            f"The {place} is above the {_pick(rng, _PLACES)} and below the hill.",
            f"What is near the {place}? We find a {_pick(rng, _ANIMALS)} there.",
            f"{name} fills the {_pick(rng, CONTAINERS)} with {thing} and starts with those of "
            f"{other}.",
            f"Out of every one of the {_pick(rng, CONTAINERS)} {name} counts the {thing}.",
            f"How does {name} end up with {thing}? Find their number, each step of the count, or "
            f"compute the sum so that the answer is right.",
            f"With a {_pick(rng, _ANIMALS)} in the {place}, how can we wait {time}?",
            f"We look at the {thing} of {name}, and the {_pick(rng, _PEOPLE)} looks at those of "
            f"{other}.",
            f"Step by step {subject.lower()} {_pick(rng, _ACTIONS)} up to that {place}.",
        ),
    )


_MIXTURE: dict[Callable[[random.Random], str], int] = {
    _facts: 5,
    _chain: 3,
    _recall: 3,
    _story: 6,
    _groups: 1,
    _meaning: 4,
    _plain_text: 4,
}


def _pick(rng: random.Random, items: Sequence[_Item]) -> _Item:
    return items[_below(rng, len(items))]


def _below(rng: random.Random, bound: int) -> int:
    """A whole number from 0 to bound - 1."""
    return int(rng.random() * bound)

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.split import choose_rows, hold_out, normalise
from loratune.errors import DataError

groups_of_rows = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2 + 2?", "  what is\n2 + 2 "),
        ('He said "yes".', "he said \u201cYes\u201d"),
        ("Stra\u00dfe", "STRASSE"),
        ("Ann\u2019s cat (a big one)", "ann's cat a big one!"),
        ("\uff12 plus 2", "2 plus 2"),
    ],
)
def test_spellings_of_one_question_are_the_same(one, other):
    assert normalise(one) == normalise(other)


def test_questions_that_mean_different_things_stay_apart():
    questions = [
        "3 * 4",
        "3 / 4",
        "3 - 4",
        "3 + 4",
        "3 4",
        "1.5",
        "15",
        ".5",
        "5",
        "-5",
        "50%",
        "50",
    ]

    assert len({normalise(question) for question in questions}) == len(questions)


@given(groups_of_rows, st.data())
def test_hold_out_takes_whole_groups_of_exactly_the_size_or_says_that_there_are_none(groups, data):
    num_rows = data.draw(st.integers(1, len(groups) - 1))
    sizes = [groups.count(key) for key in set(groups)]
    possible = any(
        sum(part) == num_rows
        for number in range(len(sizes) + 1)
        for part in itertools.combinations(sizes, number)
    )

    if not possible:
        with pytest.raises(DataError, match="cannot be made of whole groups"):
            hold_out(groups, num_rows=num_rows)
        return
    split = hold_out(groups, num_rows=num_rows)
    held = {groups[row] for row in split.held_out}
    assert len(split.held_out) == num_rows
    assert len(held) == split.num_groups
    assert held.isdisjoint(groups[row] for row in split.remaining)
    assert sorted([*split.held_out, *split.remaining]) == list(range(len(groups)))


@given(groups_of_rows, st.randoms(use_true_random=False))
def test_the_held_out_groups_do_not_depend_on_the_order_of_the_rows(groups, rng):
    groups = [*groups, "one", "two", "three"]
    shuffled = rng.sample(groups, len(groups))

    sides = [
        {given_groups[row] for row in hold_out(given_groups, num_rows=2).held_out}
        for given_groups in (groups, shuffled)
    ]

    assert sides[0] == sides[1]


def test_a_hold_out_of_all_rows_is_refused():
    with pytest.raises(DataError, match=r"leaves no training row: 3 rows .* at most 2"):
        hold_out(["a", "b", "c"], num_rows=3)


def test_a_size_that_groups_cannot_make_names_one_that_they_can():
    groups = ["a"] * 10 + ["b"] * 10 + ["c"] * 10

    with pytest.raises(DataError, match=r"3 groups of 10 to 10 rows.; choose 10, or another"):
        hold_out(groups, num_rows=15)
    assert len(hold_out(groups, num_rows=10).held_out) == 10


def test_the_held_out_groups_are_the_same_for_good():
    # A change here changes the validation set of every study.
    held = hold_out([str(key) for key in range(100)], num_rows=5).held_out

    assert held.tolist() == [17, 28, 38, 52, 54]


@given(st.integers(1, 60), st.data(), st.sampled_from(["first", "random"]))
def test_a_smaller_choice_is_part_of_a_larger_one(num_remaining, data, order):
    larger = data.draw(st.integers(1, num_remaining))
    smaller = data.draw(st.integers(1, larger))

    few = choose_rows(num_remaining, rows=smaller, order=order)
    many = choose_rows(num_remaining, rows=larger, order=order)

    assert len(few) == smaller
    assert len(many) == larger
    assert set(few.tolist()) <= set(many.tolist()) <= set(range(num_remaining))


def test_first_rows_are_the_first_and_random_rows_are_spread():
    assert choose_rows(1000, rows=3, order="first").tolist() == [0, 1, 2]
    spread = choose_rows(1000, rows=100, order="random")
    # Mean of 100 draws without replacement of 0..999: 499.5, standard deviation 27.4.
    assert abs(spread.mean() - 499.5) < 5 * 27.4
    assert choose_rows(1000, rows=None, order="random").tolist() == list(range(1000))


def test_more_rows_than_remain_are_refused_with_their_number():
    with pytest.raises(DataError, match="rows=11 is more than there are: 10 rows remain"):
        choose_rows(10, rows=11, order="first")


def test_random_rows_do_not_touch_the_global_generator():
    random.seed(1)
    before = random.getstate()
    choose_rows(100, rows=10, order="random")
    assert random.getstate() == before

"""Which rows make a step, and who takes a free slot: properties that hold whatever the order."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from loratune.planning.packing import Demand, choose_next, fill_step
from loratune.records import Trial
from tiny_trials import random_data, tiny_trial

DEMANDS = st.lists(
    st.builds(
        Demand,
        slot=st.integers(0, 30),
        updates_left=st.integers(1, 50),
        row_tokens=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda one: one.slot,
)


@given(demands=DEMANDS, tokens=st.integers(1, 100), rows=st.integers(1, 20))
def test_a_step_keeps_its_budget_and_never_takes_more_than_a_batch_still_needs(
    demands, tokens, rows
):
    taken = fill_step(demands, tokens=tokens, rows=rows)
    by_slot = {one.slot: one for one in demands}
    assert taken, "progress is always made"
    assert list(taken) == sorted(taken)
    used = 0
    for slot, count in taken.items():
        assert 1 <= count <= len(by_slot[slot].row_tokens)
        used += sum(by_slot[slot].row_tokens[:count])
    assert sum(taken.values()) <= rows
    # Only a row that is longer than a step goes beyond the budget, and it goes alone.
    assert used <= tokens or list(taken.values()) == [1]
    if used > tokens:
        assert all(one.row_tokens[0] > tokens for one in demands)


@given(
    demands=DEMANDS,
    tokens=st.integers(1, 100),
    rows=st.integers(1, 20),
    shuffle=st.randoms(use_true_random=False),
)
def test_the_order_in_which_slots_are_given_does_not_matter(demands, tokens, rows, shuffle):
    shuffled = list(demands)
    shuffle.shuffle(shuffled)
    taken = fill_step(demands, tokens=tokens, rows=rows)
    if sum(demands_tokens(demands, taken)) <= tokens:
        assert fill_step(shuffled, tokens=tokens, rows=rows) == taken


def demands_tokens(demands: list[Demand], taken: dict[int, int]) -> list[int]:
    return [sum(one.row_tokens[: taken.get(one.slot, 0)]) for one in demands]


@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=12), min_size=1, max_size=6),
    batch_sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6),
    tokens=st.integers(1, 40),
    rows=st.integers(1, 6),
)
def test_trials_fed_step_by_step_give_every_row_once_in_order_and_no_step_crosses_a_batch(
    lengths, batch_sizes, tokens, rows
):
    """The engine's loop in small: a slot offers what its batch under way still needs."""
    at = [0] * len(lengths)
    seen = [list[int]() for _ in lengths]

    def demand(slot: int) -> Demand:
        size, rest = batch_sizes[slot], lengths[slot]
        end = min((at[slot] // size + 1) * size, len(rest))
        left = -(-len(rest) // size) - at[slot] // size
        return Demand(slot=slot, updates_left=left, row_tokens=rest[at[slot] : end])

    for _ in range(sum(len(one) for one in lengths)):
        demands = [demand(slot) for slot in range(len(lengths)) if at[slot] < len(lengths[slot])]
        if not demands:
            break
        for slot, count in fill_step(demands, tokens=tokens, rows=rows).items():
            begin = at[slot]
            assert begin // batch_sizes[slot] == (begin + count - 1) // batch_sizes[slot]
            seen[slot] += range(begin, begin + count)
            at[slot] += count
    assert seen == [list(range(len(one))) for one in lengths]


@given(demands=DEMANDS, tokens=st.integers(20, 100))
def test_who_has_most_updates_left_is_never_left_out_of_a_step_that_holds_its_row(demands, tokens):
    taken = fill_step(demands, tokens=tokens, rows=100)
    first = min(demands, key=lambda one: (-one.updates_left, one.slot))
    assert first.slot in taken


DATA = random_data(40)


def trials(batch_sizes: list[int]) -> list[Trial]:
    return [
        replace(tiny_trial(DATA, batch_size=size), trial_id=f"trial-{index}")
        for index, size in enumerate(batch_sizes)
    ]


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(waiting=SIZES, active=st.lists(st.integers(1, 40), max_size=5), tokens=st.integers(1, 500))
def test_a_free_slot_goes_to_most_updates_or_to_the_largest_batch_while_steps_are_not_full(
    waiting, active, tokens
):
    candidates, seated = trials(waiting), trials(active)
    chosen = choose_next(candidates, seated, tokens=tokens, mean_row_tokens=8.0)
    assert chosen in candidates
    if sum(active) * 8.0 < tokens:
        assert chosen.batch_size == max(waiting)
    else:
        assert chosen.num_updates == max(one.num_updates for one in candidates)
    # Ties go to the plan's order.
    same = [
        one
        for one in candidates
        if (one.batch_size, one.num_updates) == (chosen.batch_size, chosen.num_updates)
    ]
    assert chosen is same[0]


@given(waiting=SIZES, tokens=st.integers(1, 500), num_slots=st.integers(1, 3))
def test_whatever_the_order_every_trial_is_seated_exactly_once(waiting, tokens, num_slots):
    left, seated, chosen = trials(waiting), list[Trial](), list[str]()
    while left:
        one = choose_next(left, seated, tokens=tokens, mean_row_tokens=8.0)
        left.remove(one)
        chosen.append(one.trial_id)
        seated = [*seated, one][-num_slots:]
    assert sorted(chosen) == [one.trial_id for one in trials(waiting)]

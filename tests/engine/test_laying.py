"""A step laid end to end: its tokens, targets and filler, against the rows themselves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.rows import EncodedRows, lay_end_to_end
from loratune.engine.laying import StepRows, lay_out_step, most_filler_rows

NUM_SLOTS, LONGEST = 4, 6


@st.composite
def steps(draw: st.DrawFn) -> StepRows:
    """Rows of up to six tokens, some without any target, in the order of their slots."""
    slots = sorted(draw(st.lists(st.integers(0, NUM_SLOTS - 1), max_size=8)))
    ids, targets = list[list[int]](), list[list[bool]]()
    for _ in slots:
        length = draw(st.integers(1, LONGEST))
        ids.append(draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)))
        # A first token that is marked as a target carries no loss all the same.
        targets.append(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    count = len(slots)
    numbers = st.lists(st.floats(0, 2, width=32), min_size=count, max_size=count)
    return StepRows(
        rows=lay_end_to_end(ids, targets),
        slots=np.array(slots, dtype=np.int64),
        weights=np.array(draw(numbers), dtype=np.float64),
        keys=np.array(
            draw(st.lists(st.integers(0, 2**62), min_size=count, max_size=count)), dtype=np.int64
        ),
        fresh=frozenset(),
    )


@given(step=steps(), filler=st.integers(0, 20))
def test_targets_are_those_of_the_rows_and_filler_carries_no_loss(step, filler):
    real = len(step.rows.input_ids)
    laid = lay_out_step(step, num_slots=NUM_SLOTS, longest_row=LONGEST, num_tokens=real + filler)
    expected = list[tuple[int, int, int, float]]()
    at = 0
    for row in range(len(step.rows)):
        ids, is_target = step.rows.row(row)
        for position in range(len(ids)):
            assert laid.input_ids[at + position] == ids[position]
            assert laid.position_ids[at + position] == position
            if position and is_target[position]:
                # The token before it predicts it.
                expected.append(
                    (
                        at + position - 1,
                        int(ids[position]),
                        int(step.slots[row]),
                        float(np.float32(step.weights[row])),
                    )
                )
        at += len(ids)
    arrays = (laid.index, laid.labels, laid.slots, laid.weights)
    assert list(zip(*(one.tolist() for one in arrays), strict=True)) == expected
    assert at == real
    counts = [0] * NUM_SLOTS
    for slot, length in zip(step.slots, step.rows.lengths, strict=True):
        counts[slot] += int(length)
    assert laid.counts == counts


@given(step=steps(), filler=st.integers(0, 20), spare=st.integers(0, 3))
def test_row_bounds_bound_every_row_once_and_cut_filler_into_rows_that_are_no_longer(
    step, filler, spare
):
    real = len(step.rows.input_ids)
    total = real + filler
    num_rows = len(step.rows) + most_filler_rows(num_tokens=total, longest_row=LONGEST) + spare
    laid = lay_out_step(
        step,
        num_slots=NUM_SLOTS,
        longest_row=LONGEST,
        num_tokens=total,
        num_rows=num_rows,
    )
    assert len(laid.row_bounds) == num_rows + 1
    assert laid.row_bounds[0] == 0
    assert laid.row_bounds[-1] == total
    lengths = np.diff(laid.row_bounds)
    assert lengths[: len(step.rows)].tolist() == step.rows.lengths.tolist()
    assert lengths.min() >= 0
    assert lengths.max() <= LONGEST
    # Positions begin with each row and are within what the model knows.
    starts = laid.row_bounds[:-1][lengths > 0]
    assert (laid.position_ids[starts] == 0).all()
    if total:
        assert laid.position_ids.max() < LONGEST


@given(step=steps(), others=steps())
def test_a_rows_dropout_keys_do_not_depend_on_the_other_rows(step, others):
    def keys(one: StepRows) -> list[list[int]]:
        laid = lay_out_step(one, num_slots=NUM_SLOTS, longest_row=LONGEST)
        return [part.tolist() for part in np.split(laid.token_keys, one.rows.offsets[1:-1])]

    together = StepRows(
        rows=EncodedRows(
            np.concatenate([others.rows.input_ids, step.rows.input_ids]),
            np.concatenate([others.rows.offsets, others.rows.offsets[-1] + step.rows.offsets[1:]]),
            np.concatenate([others.rows.is_target, step.rows.is_target]),
        ),
        slots=np.concatenate([np.zeros_like(others.slots), np.full_like(step.slots, 3)]),
        weights=np.concatenate([others.weights, step.weights]),
        keys=np.concatenate([others.keys, step.keys]),
        fresh=frozenset(),
    )
    if len(step.rows):
        assert keys(together)[-len(step.rows) :] == keys(step)

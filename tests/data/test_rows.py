import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.rows import concatenate, cut_microbatches, lay_end_to_end, pad_rows

ROWS = [[5, 6, 7], [8], [], [9, 10, 11, 12]]
MASKS = [[False, True, True], [False], [], [False, False, False, True]]


def test_take_gives_the_rows_asked_for_in_that_order_and_as_often():
    rows = lay_end_to_end(ROWS, MASKS).take([3, 0, 2, 3])

    assert [rows.row(i)[0].tolist() for i in range(4)] == [ROWS[i] for i in (3, 0, 2, 3)]
    assert [rows.row(i)[1].tolist() for i in range(4)] == [MASKS[i] for i in (3, 0, 2, 3)]
    assert rows.lengths.tolist() == [4, 3, 0, 4]


def test_parts_put_together_are_the_rows_laid_out_at_once():
    whole = lay_end_to_end(ROWS, MASKS)
    parts = concatenate([lay_end_to_end(ROWS[:1], MASKS[:1]), lay_end_to_end(ROWS[1:], MASKS[1:])])

    np.testing.assert_array_equal(parts.input_ids, whole.input_ids)
    np.testing.assert_array_equal(parts.offsets, whole.offsets)
    np.testing.assert_array_equal(parts.is_target, whole.is_target)
    assert len(concatenate([])) == 0


def test_a_row_out_of_range_is_refused_instead_of_counted_from_the_end():
    with pytest.raises(IndexError):
        lay_end_to_end(ROWS, MASKS).row(-1)


def test_padding_stands_on_the_right_and_carries_neither_attention_nor_loss():
    input_ids, attention_mask, is_target = pad_rows(lay_end_to_end(ROWS, MASKS), [0, 3], pad_id=99)

    assert input_ids.tolist() == [[5, 6, 7, 99], [9, 10, 11, 12]]
    assert attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert is_target.tolist() == [[False, True, True, False], [False, False, False, True]]


@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(1, 200),
)
def test_microbatches_hold_every_row_once_and_keep_to_the_budget(lengths, budget):
    cuts = cut_microbatches(lengths, tokens_per_microbatch=budget)

    assert sorted(int(i) for cut in cuts for i in cut) == list(range(len(lengths)))
    for cut in cuts:
        assert len(cut) == 1 or len(cut) * max(lengths[i] for i in cut) <= budget


def test_microbatches_group_rows_of_like_length():
    cuts = cut_microbatches([1, 100, 2, 99, 3], tokens_per_microbatch=200)

    assert [sorted(cut.tolist()) for cut in cuts] == [[1, 3], [0, 2, 4]]


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(ValueError, match="give at least 1"):
        cut_microbatches([1], tokens_per_microbatch=0)

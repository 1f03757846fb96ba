import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.order import row_order


@given(st.integers(0, 5), st.integers(1, 30), st.integers(0, 200), st.integers(0, 100))
def test_any_slice_is_that_of_the_whole_stream(seed, num_rows, start, count):
    whole = row_order(seed, num_rows=num_rows, start=0, count=start + count)
    part = row_order(seed, num_rows=num_rows, start=start, count=count)

    np.testing.assert_array_equal(part, whole[start:])


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(0, 10))
def test_every_epoch_holds_every_row_once(seed, num_rows, epoch):
    order = row_order(seed, num_rows=num_rows, start=epoch * num_rows, count=num_rows)

    assert sorted(order.tolist()) == list(range(num_rows))


def test_batches_of_any_size_walk_through_the_same_rows():
    def walk(batch_size: int) -> list[int]:
        starts = range(0, 240, batch_size)
        return [
            int(row)
            for start in starts
            for row in row_order(3, num_rows=100, start=start, count=batch_size)
        ]

    assert walk(1) == walk(8) == walk(120) == walk(240)


def test_seeds_and_epochs_differ_in_their_order():
    orders = {
        tuple(row_order(seed, num_rows=50, start=50 * epoch, count=50).tolist())
        for seed in range(10)
        for epoch in range(10)
    }

    assert len(orders) == 100


def test_the_order_is_the_same_for_good():
    # A change here changes what every stored trial was trained on.
    first, second = [9, 5, 4, 7, 2, 6, 0, 3, 8, 1], [7, 2, 0, 1, 4, 5, 8, 6, 9, 3]

    assert row_order(0, num_rows=10, start=0, count=20).tolist() == first + second


def test_every_row_comes_first_about_equally_often():
    first = [int(row_order(seed, num_rows=4, start=0, count=1)[0]) for seed in range(2000)]

    # 2,000 draws of probability 1/4: standard deviation 19.4; five of them either way.
    assert all(abs(count - 500) < 97 for count in np.bincount(first, minlength=4))


def test_an_impossible_slice_is_refused():
    with pytest.raises(ValueError, match="num_rows=0"):
        row_order(0, num_rows=0, start=0, count=1)

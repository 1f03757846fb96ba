"""Updates, warm-up and schedules as numbers, against transformers' own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from loratune.errors import StudyError
from loratune.planning.horizon import horizon, lr_factor, warmup_steps
from loratune.study.schema import Protocol, Schedule


def samples(epochs: float) -> Protocol:
    return Protocol(kind="fixed_samples", epochs=epochs)


@given(rows=st.integers(1, 5000), size=st.integers(1, 5000), epochs=st.floats(0.01, 5))
def test_every_row_is_seen_exactly_as_often_as_the_epochs_say(rows, size, epochs):
    if size > rows or round(epochs * rows) < 1:
        return
    length = horizon(samples(epochs), num_train_rows=rows, batch_size=size)
    assert (length.num_updates - 1) * size + length.last_batch_size == length.num_samples
    assert length.num_samples == round(epochs * rows)
    assert 1 <= length.last_batch_size <= size


def test_batches_cross_the_border_of_epochs_so_that_one_is_short_at_most():
    length = horizon(samples(3.0), num_train_rows=10, batch_size=4)
    assert (length.num_updates, length.last_batch_size, length.num_samples) == (8, 2, 30)


def test_fixed_steps_are_full_batches_whatever_the_data():
    length = horizon(Protocol(kind="fixed_steps", steps=200), num_train_rows=100, batch_size=64)
    assert (length.num_updates, length.last_batch_size, length.num_samples) == (200, 64, 12800)


def test_a_batch_larger_than_the_data_is_refused_with_the_largest_that_fits():
    with pytest.raises(StudyError, match=r"batch_size=9000 exceeds num_train_rows=8000.*8000"):
        horizon(samples(1.0), num_train_rows=8000, batch_size=9000)


@pytest.mark.parametrize(("ratio", "updates"), [(0.03, 782), (0.1, 7), (0.07, 100), (0.0, 5)])
def test_a_warmup_ratio_is_rounded_up_as_transformers_does(ratio, updates):
    steps = warmup_steps(Schedule(kind="cosine", warmup_ratio=ratio), num_updates=updates)
    assert steps == math.ceil(round(ratio * updates, 9))
    # 0.07 * 100 is 7.000000000000001 in floating point, and 7 to everybody else.
    assert warmup_steps(Schedule(kind="cosine", warmup_ratio=0.07), num_updates=100) == 7


def test_a_warmup_as_long_as_the_training_is_refused():
    with pytest.raises(StudyError, match="warmup_steps=100 leaves nothing of 100 updates"):
        warmup_steps(Schedule(kind="linear", warmup_steps=100), num_updates=100)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("num_updates", "warmup"), [(1, 0), (2, 1), (20, 0), (50, 7), (200, 199)])
def test_factors_are_those_of_transformers_at_every_update(kind, num_updates, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        make = {
            "cosine": get_cosine_schedule_with_warmup,
            "linear": get_linear_schedule_with_warmup,
        }[kind]
        schedule = make(optimizer, warmup, num_updates)
    for update in range(num_updates):
        ours = lr_factor(kind, update=update, num_updates=num_updates, warmup=warmup)
        assert ours == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


def test_a_ratio_that_leaves_no_update_with_a_learning_rate_is_refused():
    with pytest.raises(StudyError, match=r"warmup_ratio=0.03 leaves nothing of 1 updates"):
        warmup_steps(Schedule(kind="cosine", warmup_ratio=0.03), num_updates=1)
    assert warmup_steps(Schedule(kind="cosine", warmup_ratio=0.0), num_updates=1) == 0

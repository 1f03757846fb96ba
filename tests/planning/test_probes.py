"""When probes are due, and that their counts are those of walking through a trial."""

from dataclasses import replace

import pytest

from loratune.planning.probes import NO_PROBES, count_probes, probe_totals, probing
from loratune.records import NoiseSchedule, Trial
from tiny_trials import random_data, tiny_trial

DATA = random_data(60)


def trial_of(batch_size: int, *, last: int | None = None, updates: int = 23) -> Trial:
    trial = tiny_trial(DATA, batch_size=batch_size)
    return replace(trial, num_updates=updates, last_batch_size=last or batch_size)


@pytest.mark.parametrize(
    ("batch_size", "last", "updates"), [(1, 1, 60), (7, 3, 9), (8, 8, 21), (8, 5, 21), (20, 9, 22)]
)
def test_counts_are_those_of_a_walk_through_the_updates(batch_size: int, last: int, updates: int):
    trial = trial_of(batch_size, last=last, updates=updates)
    plan = probing(trial, NoiseSchedule(10, 16, held_out_rows=12), num_validation_rows=40)
    in_batches = pooled = held_out = rows = 0
    for update in range(updates):
        size = last if update == updates - 1 else batch_size
        if plan.of_batch(update, num_rows=size):
            in_batches, rows = in_batches + 1, rows + size
        pooled += plan.of_pooled(update)
        held_out += plan.of_held_out(update)
    counts = count_probes(trial, plan)
    assert counts.num_train == in_batches + pooled
    assert counts.num_held_out == held_out
    assert counts.num_rows_in_batches == rows
    assert counts.num_rows_apart == 16 * pooled + 12 * held_out
    assert (in_batches == 0) == (batch_size < 8)


def test_rows_apart_are_one_for_every_period_that_trains_whatever_the_batch():
    for batch_size in (1, 2, 4, 7):
        trial = trial_of(batch_size, updates=4000)
        plan = probing(trial, NoiseSchedule(10, 16), num_validation_rows=0)
        share = count_probes(trial, plan).num_rows_apart / (4000 * batch_size)
        # A probe waits for whole batches, and the first one comes at once.
        assert 0.07 < share < 0.101


def test_without_a_schedule_or_rows_nothing_is_probed():
    trial = trial_of(8)
    assert probing(trial, None, num_validation_rows=40) == NO_PROBES
    plan = probing(trial, NoiseSchedule(10, 16, held_out_rows=12), num_validation_rows=0)
    assert plan.held_out_every is None


def test_totals_are_rows_times_what_a_row_costs():
    trials = [trial_of(1, updates=50), trial_of(8, updates=50)]
    schedule = NoiseSchedule(10, 16, held_out_rows=4)
    totals = probe_totals(
        trials,
        schedule,
        num_validation_rows=40,
        tokens_per_row=[10.0, 100.0],
        flops_per_row=[1e3, 1e4],
    )
    first, second = (
        count_probes(one, probing(one, schedule, num_validation_rows=40)).num_rows_apart
        for one in trials
    )
    assert totals.num_rows_apart == first + second > 0
    assert totals.tokens == 10 * first + 100 * second
    assert totals.flops == 1e3 * first + 1e4 * second

"""The reference engine's noise probes against a backward pass for every single row.

Tolerance. All of it is float32; sums of a few thousand squares in another order differ by some
1e-7; promised of norms: 1e-5. Scaled sums are mostly of the few coordinates whose second moment is
nearly zero, whose gradients are what is left of larger numbers. Measured there: up to 2.5e-5.
"""

from dataclasses import replace

import numpy as np
import pytest

from loratune.data.order import row_order
from loratune.data.rows import concatenate
from loratune.engine.base import Snapshot
from loratune.errors import StudyError
from loratune.models.load import set_gradient_checkpointing
from loratune.records import NoiseProbe, NoiseSchedule
from row_oracle import differences, expected_probe, reference_probes, snapshots_of
from tiny_packs import PACKABLE
from tiny_trials import random_data, tiny_base, tiny_trial

TOLERANCE = 1e-5
SCALED_TOLERANCE = 1e-5
FAMILIES = ("llama", "qwen3", "gemma3")
EVERY_TRAIN = NoiseSchedule(every=1, rows=12)
EVERY_UPDATE = NoiseSchedule(every=1, rows=12, held_out_rows=6)


def worst_scaled(found: list[NoiseProbe], expected: list[NoiseProbe]) -> float:
    return _worst(found, expected, scaled=True)


def worst(found: list[NoiseProbe], expected: list[NoiseProbe]) -> float:
    return _worst(found, expected, scaled=False)


def _worst(found: list[NoiseProbe], expected: list[NoiseProbe], *, scaled: bool) -> float:
    assert len(found) == len(expected)
    return max(
        value
        for one, other in zip(found, expected, strict=True)
        for name, value in differences(one, other).items()
        if ("scaled" in name) == scaled
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PACKABLE)
def test_norms_equal_those_of_single_backward_passes(family: str, method: str):
    data = random_data(24)
    base = tiny_base(family)
    trial = tiny_trial(data, method=method, batch_size=8)
    states = snapshots_of(trial, data, base, tokens_per_microbatch=40)
    # The cut into micro-batches is another one than the oracle's.
    probes, _ = reference_probes(trial, data, EVERY_UPDATE, base=base, tokens_per_microbatch=40)
    train = [one for one in probes if one.split == "train"]
    expected = [
        expected_probe(
            trial,
            base,
            data.train,
            row_order(trial.seed, num_rows=24, start=8 * update, count=8),
            states.get(update),
            update=update,
            split="train",
        )
        for update in range(3)
    ]
    assert worst(train, expected) < TOLERANCE
    assert worst_scaled(train, expected) < SCALED_TOLERANCE
    assert [one.block for one in train[0].blocks] == (
        ["A", "B", "other"] if method == "dora" else ["A", "B"]
    )


def test_gradients_of_a_are_zero_at_the_start_and_nothing_is_scaled_yet():
    data = random_data(24)
    probes, _ = reference_probes(
        tiny_trial(data, batch_size=8), data, NoiseSchedule(every=1, rows=8)
    )
    of_a, of_b = probes[0].blocks
    assert (of_a.sum_squares, of_a.mean_square) == (0.0, 0.0)
    assert of_b.sum_squares > 0
    assert {one.scaled_sum_squares for one in probes[0].blocks} == {None}
    # Adam has seen one gradient, in which A's was zero: no coordinate of A is left.
    of_a, of_b = probes[1].blocks
    assert of_a.sum_squares > 0
    assert of_a.scaled_sum_squares is None
    assert of_b.scaled_sum_squares is not None
    assert probes[2].blocks[0].scaled_sum_squares is not None


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_a_probed_trial_is_bit_for_bit_the_trial_without_probes(method: str):
    data = random_data(40)
    for batch_size, dropout in ((8, 0.25), (3, 0.25), (8, 0.0)):
        trial = tiny_trial(data, method=method, batch_size=batch_size, dropout=dropout)
        _, plain = reference_probes(trial, data, None)
        probes, probed = reference_probes(trial, data, NoiseSchedule(1, 8, held_out_rows=4))
        assert {one.split for one in probes} == {"train", "validation"}
        same = replace(probed.outcome, seconds=plain.outcome.seconds)
        assert same == plain.outcome
        assert plain.adapter is not None
        assert probed.adapter is not None
        for name, tensor in plain.adapter.tensors.items():
            assert tensor.equal(probed.adapter.tensors[name]), name


def test_the_cut_into_micro_batches_and_checkpointing_do_not_change_the_norms():
    data = random_data(24)
    trial = tiny_trial(data, batch_size=12, method="dora", steps=3)
    # All go on from one state, which no cut has rounded otherwise, and have one probe before they
    # update.
    state = snapshots_of(trial, data, tiny_base())[2]
    whole, *_ = reference_probes(trial, data, EVERY_TRAIN, snapshot=state)[0]
    cut, *_ = reference_probes(trial, data, EVERY_TRAIN, tokens_per_microbatch=12, snapshot=state)[
        0
    ]
    base = tiny_base()
    set_gradient_checkpointing(base.model, enabled=True)
    checkpointed, *_ = reference_probes(
        trial, data, EVERY_TRAIN, base=base, tokens_per_microbatch=50, snapshot=state
    )[0]
    assert whole.update == 2
    assert {one.scaled_sum_squares is None for one in whole.blocks} == {False}
    assert worst([cut], [whole]) < TOLERANCE
    assert worst_scaled([cut], [whole]) < SCALED_TOLERANCE
    assert worst([checkpointed], [whole]) < TOLERANCE
    assert worst_scaled([checkpointed], [whole]) < SCALED_TOLERANCE


def test_small_batches_pool_rows_of_their_own_stream_at_frozen_weights():
    data = random_data(24)
    base = tiny_base()
    trial = tiny_trial(data, batch_size=2)
    states = snapshots_of(trial, data, base)
    probes, _ = reference_probes(trial, data, NoiseSchedule(every=1, rows=10), base=base)
    # Ten rows every five updates of two rows: one row for each row that trains.
    assert [one.update for one in probes] == [0, 5, 10]
    expected = [
        expected_probe(
            trial,
            base,
            data.train,
            row_order(trial.seed, num_rows=24, start=2 * update, count=10),
            states.get(update),
            update=update,
            split="train",
        )
        for update in (0, 5)
    ]
    assert worst(probes[:2], expected) < TOLERANCE
    assert worst_scaled(probes[:2], expected) < SCALED_TOLERANCE


def test_held_out_probes_go_through_the_validation_rows_in_an_order_that_trials_share():
    data = random_data(24, num_validation=9)
    assert data.validation is not None
    base = tiny_base()
    trial = tiny_trial(data, batch_size=8)
    states = snapshots_of(trial, data, base)
    probes, _ = reference_probes(
        trial, data, NoiseSchedule(every=1, rows=8, held_out_rows=3), base=base
    )
    held_out = [one for one in probes if one.split == "validation"]
    rows = row_order(0, num_rows=9, start=0, count=9)
    expected = [
        expected_probe(
            trial,
            base,
            data.validation,
            rows[3 * update : 3 * update + 3],
            states.get(update),
            update=update,
            split="validation",
        )
        for update in range(3)
    ]
    assert worst(held_out, expected) < TOLERANCE
    assert worst_scaled(held_out, expected) < SCALED_TOLERANCE
    other, _ = reference_probes(
        replace(trial, seed=5), data, NoiseSchedule(every=1, rows=8, held_out_rows=3), base=base
    )
    assert other[0].num_targets == held_out[0].num_targets


def test_rows_that_come_twice_are_one_example():
    once = random_data(12, num_validation=0)
    trial = tiny_trial(once, batch_size=12, steps=2)
    both = replace(once, train=concatenate([once.train, once.train]))
    twice = replace(trial, batch_size=24, num_train_rows=24)
    (single, *_), _ = reference_probes(trial, once, NoiseSchedule(every=1, rows=8))
    (double, *_), _ = reference_probes(twice, both, NoiseSchedule(every=1, rows=8))
    assert (double.num_rows, double.num_examples) == (24, 12)
    as_once = replace(
        double, num_rows=12, num_targets=single.num_targets, num_tokens=single.num_tokens
    )
    assert max(differences(as_once, single).values()) < TOLERANCE


def test_going_on_from_a_snapshot_probes_as_if_nothing_had_happened():
    data = random_data(40)
    base = tiny_base()
    trial = tiny_trial(data, batch_size=8)
    schedule = NoiseSchedule(every=2, rows=8, held_out_rows=4)
    whole, _ = reference_probes(trial, data, schedule, base=base)
    states: dict[int, Snapshot] = snapshots_of(trial, data, base)
    rest, _ = reference_probes(trial, data, schedule, base=base, snapshot=states[2])
    assert rest == [one for one in whole if one.update >= 2]
    assert np.isfinite(rest[0].blocks[0].sum_squares)


def test_a_method_whose_numbers_are_no_factors_is_refused():
    data = random_data(24)
    trial = tiny_trial(data, method="adalora", batch_size=2, steps=12)
    with pytest.raises(StudyError, match=r"adalora.*neither A, B nor"):
        reference_probes(trial, data, NoiseSchedule(every=1, rows=8))

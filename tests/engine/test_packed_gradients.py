"""The packed engine's noise probes against a backward pass for every single row.

Tolerance as in `test_hooked_gradients`: float32 sums in another order. The states before an update
differ from the reference engine's by rounding, which second moments near zero make much of: the
probe before the first update (raw) and the one right after a shared snapshot (scaled) are compared.
"""

from dataclasses import replace

import pytest

from loratune.data.order import row_order
from loratune.engine.base import Snapshot
from loratune.records import NoiseProbe, NoiseSchedule
from row_oracle import differences, expected_probe
from tiny_packs import PACKABLE, Packed, mixed_trials, pack, shape_for
from tiny_trials import random_data, tiny_base, tiny_trial

TOLERANCE = 1e-5
DATA = random_data(24, num_validation=9)
SCHEDULE = NoiseSchedule(every=1, rows=10, held_out_rows=3)


def probes_of(packed: Packed, trial_id: str) -> list[NoiseProbe]:
    return [e for e in packed.events if isinstance(e, NoiseProbe) and e.trial_id == trial_id]


@pytest.mark.parametrize("method", PACKABLE)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_norms_equal_those_of_single_backward_passes(method: str, family: str):
    base = tiny_base(family)
    whole = replace(tiny_trial(DATA, method=method, batch_size=12), trial_id="whole")
    small = replace(tiny_trial(DATA, method="lora", batch_size=3, seed=4), trial_id="small")
    # Steps of 40 tokens: no batch fits into one.
    shape = shape_for([whole, small], tokens_per_step=40)
    packed = pack([whole, small], [DATA], base=base, shape=shape, noise=SCHEDULE)
    for trial, count in ((whole, 12), (small, 10)):
        (probe, *_) = [one for one in probes_of(packed, trial.trial_id) if one.split == "train"]
        rows = row_order(trial.seed, num_rows=24, start=0, count=count)
        expected = expected_probe(trial, base, DATA.train, rows, None, update=0, split="train")
        assert max(differences(probe, expected).values()) < TOLERANCE
        (held_out, *_) = [
            one for one in probes_of(packed, trial.trial_id) if one.split == "validation"
        ]
        assert DATA.validation is not None
        expected = expected_probe(
            trial,
            base,
            DATA.validation,
            row_order(0, num_rows=9, start=0, count=3),
            None,
            update=0,
            split="validation",
        )
        assert max(differences(held_out, expected).values()) < TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True])
def test_neighbours_the_cut_and_checkpointing_do_not_change_the_norms(checkpointing: bool):
    trial = tiny_trial(DATA, method="dora", batch_size=12, steps=3)
    others = [
        replace(tiny_trial(DATA, batch_size=5, seed=seed), trial_id=f"other {seed}")
        for seed in (1, 2)
    ]
    base = tiny_base()
    alone = pack([trial], [DATA], base=base, noise=SCHEDULE, wants=lambda: True)
    (state, *_) = [
        one for one in alone.snapshots() if one.update == 2 and "grads" not in one.tensors
    ]

    def scaled(packed: Packed) -> NoiseProbe:
        found = probes_of(packed, trial.trial_id)
        (probe,) = [one for one in found if one.split == "train" and one.update == 2]
        assert {one.scaled_sum_squares is None for one in probe.blocks} == {False}
        return probe

    going_on = {trial.trial_id: state}
    expected = scaled(pack([trial], [DATA], base=base, snapshots=going_on, noise=SCHEDULE))
    shape = shape_for([trial, *others], tokens_per_step=32, gradient_checkpointing=checkpointing)
    together = pack(
        [trial, *others], [DATA], base=base, shape=shape, snapshots=going_on, noise=SCHEDULE
    )
    assert max(differences(scaled(together), expected).values()) < TOLERANCE


def test_probes_change_no_trial_of_a_mixed_pack():
    # On a CPU a probed step computes what it would have computed without: bit for bit.
    small, large = random_data(24), random_data(60, seed=3)
    trials = [*mixed_trials(small, large)]
    trials += [
        replace(tiny_trial(small, batch_size=batch, dropout=0.25), trial_id=f"dropout {batch}")
        for batch in (2, 8)
    ]
    base = tiny_base()
    plain = pack(trials, [small, large], base=base)
    probed = pack(trials, [small, large], base=base, noise=SCHEDULE)
    assert plain.failed() == probed.failed() == {}
    for trial in trials:
        assert {one.split for one in probes_of(probed, trial.trial_id)} == {"train", "validation"}
        one, other = plain.finished(trial.trial_id), probed.finished(trial.trial_id)
        assert replace(one.outcome, seconds=other.outcome.seconds) == other.outcome
        assert one.adapter is not None
        assert other.adapter is not None
        for name, tensor in one.adapter.tensors.items():
            assert tensor.equal(other.adapter.tensors[name]), (trial.trial_id, name)


def test_a_snapshot_within_a_watched_batch_keeps_what_was_seen():
    trial = tiny_trial(DATA, batch_size=12)
    base = tiny_base()
    shape = shape_for([trial], tokens_per_step=32)
    whole = pack([trial], [DATA], base=base, shape=shape, noise=SCHEDULE, wants=lambda: True)
    inside: list[Snapshot] = [one for one in whole.snapshots() if "watched" in one.tensors]
    assert inside
    rest = pack(
        [trial],
        [DATA],
        base=base,
        shape=shape,
        snapshots={trial.trial_id: inside[0]},
        noise=SCHEDULE,
    )
    expected = probes_of(whole, trial.trial_id)
    found = [one for one in probes_of(rest, trial.trial_id) if one.split == "train"]
    assert found == [
        one for one in expected if one.split == "train" and one.update >= inside[0].update
    ]

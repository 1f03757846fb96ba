"""What only a CUDA device can show of the packed engine's probes: probed steps are not replayed."""

import pytest

from loratune.data.order import row_order
from loratune.records import NoiseProbe, NoiseSchedule
from row_oracle import differences, expected_probe
from tiny_packs import pack
from tiny_trials import random_data, tiny_base, tiny_trial
from torch_devices import ON_CUDA

pytestmark = ON_CUDA


def test_probes_between_replayed_steps_are_right_and_leave_training_within_rounding():
    data = random_data(40)
    base = tiny_base(device="cuda")
    trial = tiny_trial(data, batch_size=8, learning_rate=1e-3, steps=12)
    plain = pack([trial], [data], base=base)
    probed = pack([trial], [data], base=base, noise=NoiseSchedule(3, 8, held_out_rows=4))
    found = [one for one in probed.events if isinstance(one, NoiseProbe)]
    assert [one.update for one in found if one.split == "train"] == [0, 3, 6, 9]
    first = next(one for one in found if one.split == "train")
    rows = row_order(trial.seed, num_rows=40, start=0, count=8)
    expected = expected_probe(trial, tiny_base(), data.train, rows, None, update=0, split="train")
    # float32 on both, other orders of sums and other kernels; TF32 is off by default.
    assert max(differences(first, expected).values()) < 1e-4
    ours, theirs = (one.finished(trial.trial_id).outcome.losses for one in (probed, plain))
    assert ours == pytest.approx(theirs, rel=1e-4)

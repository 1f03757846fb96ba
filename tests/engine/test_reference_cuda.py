"""What only a CUDA device can show of the reference engine."""

import pytest
import torch

from feeds import ListFeed
from loratune.engine.base import Finished, Snapshot
from loratune.engine.reference import ReferenceEngine
from tiny_trials import random_data, tiny_base, tiny_trial, train
from torch_devices import ON_CUDA

pytestmark = ON_CUDA
METHODS = ["lora", "rslora", "pissa", "milora", "dora", "loraplus", "olora", "adalora"]


@pytest.mark.parametrize("method", METHODS)
def test_losses_on_cuda_are_those_of_the_cpu(method):
    data = random_data(40)
    trial = tiny_trial(data, method=method)
    ours, _ = train(trial, data, base=tiny_base(device="cuda"))
    theirs, _ = train(trial, data)
    # float32 on both, other orders of sums; TF32 is off by default.
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.peak_memory_bytes is not None
    assert theirs.peak_memory_bytes is None


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_snapshot_on_cuda_is_bit_equal(method):
    data = random_data(40)
    base = tiny_base(device="cuda", dtype=torch.bfloat16)
    trial = tiny_trial(data, method=method, precision="bfloat16", batch_size=4, dropout=0.1)
    engine = ReferenceEngine(
        base, {trial.data_fingerprint: data}, tokens_per_microbatch=lambda _: 40
    )
    events = list(engine.train(ListFeed([trial], wants=lambda: True)))
    snapshot = next(event for event in events if isinstance(event, Snapshot) and event.update == 5)
    finished = events[-1]
    assert isinstance(finished, Finished)
    again, _ = train(trial, data, base=base, snapshot=snapshot)
    assert again.losses == finished.outcome.losses
    assert again.validation_loss == finished.outcome.validation_loss

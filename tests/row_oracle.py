"""Row gradients by a loop of backward passes over single rows: the oracle of both engines."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feeds import ListFeed
from loratune.data.prepare import PreparedData
from loratune.data.rows import EncodedRows
from loratune.engine.base import Finished, Snapshot
from loratune.engine.loss import microbatches, num_targets, target_loss_sum
from loratune.engine.reference import ReferenceEngine
from loratune.methods import load_method
from loratune.models.load import Base
from loratune.models.targets import target_modules
from loratune.records import BlockSums, NoiseProbe, NoiseSchedule, Trial
from tiny_models import PAD_ID
from tiny_trials import tiny_base


def snapshots_of(
    trial: Trial, data: PreparedData, base: Base, *, tokens_per_microbatch: int = 10_000
) -> dict[int, Snapshot]:
    """The trial's state before every update but the first, by the reference engine without noise.

    Another cut into micro-batches rounds otherwise, which second moments near zero make much of: a
    probe is held against the states of its own cut.
    """
    engine = ReferenceEngine(
        base,
        {trial.data_fingerprint: data},
        tokens_per_microbatch=lambda _: tokens_per_microbatch,
    )
    events = engine.train(ListFeed([trial], wants=lambda: True))
    return {one.update: one for one in events if isinstance(one, Snapshot)}


def row_gradients(
    trial: Trial,
    base: Base,
    rows: EncodedRows,
    indices: NDArray[np.int64],
    state: Mapping[str, Tensor] | None,
) -> list[dict[str, list[Tensor]]]:
    """Each row's g_i by block, float32, from one backward pass a row; `state` is `Attached`'s."""
    targets = target_modules(base.model, trial.targets)
    attached = load_method(trial.method.name).attach(base.model, trial, targets=targets)
    if state is not None:
        attached.load_state(state)
    attached.model.eval()
    total = num_targets(rows, indices)
    found = list[dict[str, list[Tensor]]]()
    for index in indices:
        (part,) = microbatches(
            rows,
            np.array([index]),
            pad_id=PAD_ID,
            device=base.device,
            tokens_per_microbatch=10_000,
        )
        loss = target_loss_sum(attached.model, part) * len(indices) / total
        groups = attached.parameter_groups()
        grads = iter(
            torch.autograd.grad(loss, [one for group in groups for one in group.parameters])
        )
        found.append({g.name: [next(grads).double() for _ in g.parameters] for g in groups})
    attached.detach()
    return found


def expected_probe(
    trial: Trial,
    base: Base,
    rows: EncodedRows,
    indices: NDArray[np.int64],
    snapshot: Snapshot | None,
    *,
    update: int,
    split: Any,
) -> NoiseProbe:
    """The record that a probe of different rows without dropout should be, from the loop."""
    state, second = None, dict[int, Tensor]()
    if snapshot is not None:
        tensors = snapshot.tensors
        state = {
            name.removeprefix("adapter."): tensor
            for name, tensor in tensors.items()
            if name.startswith("adapter.")
        }
        second = {
            int(name.split(".")[1]): tensor.double()
            for name, tensor in tensors.items()
            if name.startswith("optimizer.") and name.endswith("exp_avg_sq")
        }
    gradients = row_gradients(trial, base, rows, indices, state)
    blocks = list[BlockSums]()
    at = 0
    for name in gradients[0]:
        count = len(gradients[0][name])
        flat = [torch.cat([part.flatten() for part in one[name]]) for one in gradients]
        mean = torch.stack(flat).mean(dim=0)
        scaled = None
        if second:
            v = torch.cat([second[at + k].flatten() for k in range(count)])
            v = v / (1 - trial.beta2**update)
            kept = v > 1e-10 * v.max()
            root = v[kept].sqrt()
            scaled = [one[kept] / root for one in flat] if kept.any() else None
        scaled_mean = None if scaled is None else torch.stack(scaled).mean(dim=0)
        blocks.append(
            BlockSums(
                block=name,  # pyright: ignore[reportArgumentType]
                sum_squares=float(sum(one.square().sum() for one in flat)),
                mean_square=float(mean.square().sum()),
                scaled_sum_squares=None
                if scaled is None
                else float(sum(one.square().sum() for one in scaled)),
                scaled_mean_square=None
                if scaled_mean is None
                else float(scaled_mean.square().sum()),
            )
        )
        at += count
    return NoiseProbe(
        trial_id=trial.trial_id,
        update=update,
        split=split,
        num_rows=len(indices),
        num_examples=len(indices),
        num_targets=num_targets(rows, indices),
        num_tokens=int(rows.lengths[indices].sum()),
        blocks=tuple(blocks),
    )


def reference_probes(
    trial: Trial,
    data: PreparedData,
    noise: NoiseSchedule | None,
    *,
    base: Base | None = None,
    tokens_per_microbatch: int = 10_000,
    snapshot: Snapshot | None = None,
) -> tuple[list[NoiseProbe], Finished]:
    """All probes of a trial on the reference engine, and its end."""
    engine = ReferenceEngine(
        base or tiny_base(),
        {trial.data_fingerprint: data},
        tokens_per_microbatch=lambda _: tokens_per_microbatch,
        noise=noise,
    )
    if snapshot is not None:
        # An engine goes on in the snapshot's own tensors.
        tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        snapshot = replace(snapshot, tensors=tensors)
    events = list(engine.train(ListFeed([trial], {trial.trial_id: snapshot})))
    (end,) = [one for one in events if isinstance(one, Finished)]
    return [one for one in events if isinstance(one, NoiseProbe)], end


def differences(found: NoiseProbe, expected: NoiseProbe) -> dict[str, float]:
    """How far each sum is from the expected one, relative to it; all else must be equal."""
    assert replace(found, blocks=()) == replace(expected, blocks=())
    assert [one.block for one in found.blocks] == [one.block for one in expected.blocks]
    result = dict[str, float]()
    for mine, other in zip(found.blocks, expected.blocks, strict=True):
        for name in (
            "sum_squares",
            "mean_square",
            "scaled_sum_squares",
            "scaled_mean_square",
        ):
            a, b = getattr(mine, name), getattr(other, name)
            assert (a is None) == (b is None), (mine.block, name, a, b)
            if a is not None:
                result[f"{mine.block} {name}"] = abs(a - b) / b if b else abs(a)
    return result

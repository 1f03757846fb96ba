"""What a study's packs will look like and take: slots, tokens a step, memory, hours. Pure.

An estimate from a measured table of one device. Not covered: start-up and compilation, validation,
steps that are not full (a study whose trials cannot fill a step is slower), DoRA's own work, the
time in which a base in nf4 is unpacked.
"""

# numpy is only partly typed.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from loratune.planning.cost import TrialCost
from loratune.planning.pack_shape import pack_bytes, plan_pack
from loratune.planning.packing import NOT_PACKED, PackShape
from loratune.planning.trials import DataKey
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.methods import describe

# Checkpointed blocks run their forward once more: about 6 N FLOPs a token in the place of 4 N.
CHECKPOINTED = 1.5
# Hidden width and FLOP/s of full steps, rank 16, batch size 4, one H100 (docs/benchmarks.md).
H100_PACKED = ((576, 215e12), (1024, 314e12), (2048, 452e12), (4096, 519e12))


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """The trials of one base and one set of targets, as the packed engine will train them.

    `num_trials` take turns in `shape.num_slots` slots. `hours` is the time of full steps.
    """

    model: str
    num_trials: int
    shape: PackShape
    peak_memory_bytes: int
    hours: float

    def to_json(self) -> dict[str, object]:
        """Flat, as `loratune plan --json` shows it."""
        return {
            "model": self.model,
            "num_trials": self.num_trials,
            **asdict(self.shape),
            "peak_memory_bytes": self.peak_memory_bytes,
            "hours": self.hours,
        }


def packed_flops_per_second(hidden_size: int) -> float:
    """An H100's rate in full steps, between the measured widths by their logarithms.

    Narrower models are taken to be slower in proportion (an assumption, not measured); wider ones
    to be as fast as the widest.
    """
    widths, rates = zip(*H100_PACKED, strict=True)
    rate = float(np.interp(math.log(hidden_size), np.log(widths), rates))
    return rate * min(1.0, hidden_size / widths[0])


def plan_packs(
    trials: Sequence[Trial],
    costs: Sequence[TrialCost],
    *,
    models: Mapping[str, ModelFacts],
    data: Mapping[DataKey, DataFacts],
    memory_bytes: int,
    probed: bool = False,
) -> tuple[PlannedPack, ...]:
    """The packs of a study on an H100, or a device like it, with so much memory.

    Trials that the packed engine does not have (adalora, int8 bases) are in none.

    Args:
        trials: all of the study.
        costs: theirs, in the same order.
        models: by the study's names.
        data: by model and rows.
        memory_bytes: of the device.
        probed: the study measures the noise scale.
    """
    groups = dict[tuple[object, ...], list[tuple[Trial, TrialCost]]]()
    for trial, cost in zip(trials, costs, strict=True):
        if describe(trial.method.name).packable and trial.precision not in NOT_PACKED:
            key = (trial.model, trial.precision, trial.targets)
            groups.setdefault(key, []).append((trial, cost))
    packs = list[PlannedPack]()
    for group in groups.values():
        members = [trial for trial, _ in group]
        first, model = members[0], models[members[0].model]
        row_sets = dict.fromkeys((trial.model, trial.rows) for trial in members)
        shape = plan_pack(
            members,
            model=model,
            data=[data[key] for key in row_sets],
            memory_bytes=memory_bytes,
            probed=probed,
        )
        flops = math.fsum(cost.flops for _, cost in group)
        flops *= CHECKPOINTED if shape.gradient_checkpointing else 1.0
        packs.append(
            PlannedPack(
                model=first.model,
                num_trials=len(members),
                shape=shape,
                peak_memory_bytes=pack_bytes(
                    shape, model=model, precision=first.precision, targets=first.targets
                ),
                hours=flops / packed_flops_per_second(model.hidden_size) / 3600,
            )
        )
    return tuple(packs)

"""The plan of a study: its trials and what they cost all together. Changes nothing."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loratune.errors import StudyError
from loratune.planning.cost import Rate, TrialCost, trial_cost
from loratune.planning.packs import PlannedPack, plan_packs
from loratune.planning.trials import DataKey, plan_trials
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.identity import cell_key
from loratune.study.schema import Study

DEFAULT_TOKENS_PER_MICROBATCH = 16_384

# Questions of the test sets, for the smallest difference that a study can detect.
NUM_QUESTIONS = {"gsm8k": 1319, "humaneval": 164}


@dataclass(frozen=True)
class Plan:
    """The trials in order and the totals of their costs.

    `hours` is the time of one device at `device`'s rate, one trial after another; `packs` are the
    trials as the packed engine trains them, on an H100: empty where the rate is of another device.
    `detectable_effect` is a fraction (0.03 = 3 points) or None where no test task with a known size
    is scored; `provisional` says that model or data were declared, so that ids will change.
    """

    study: Study
    trials: tuple[Trial, ...]
    costs: tuple[TrialCost, ...]
    num_cells: int
    num_updates: int
    tokens: float
    flops: float
    hours: float
    device: str
    peak_memory_bytes: int
    disk_bytes: int
    detectable_effect: float | None
    provisional: bool
    packs: tuple[PlannedPack, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The totals under the names that others rely on."""
        return {
            "study": self.study.study,
            "num_trials": len(self.trials),
            "num_cells": self.num_cells,
            "num_updates": self.num_updates,
            "tokens": round(self.tokens),
            "flops": self.flops,
            "hours": self.hours,
            "device": self.device,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "detectable_effect": self.detectable_effect,
            "provisional": self.provisional,
            "packs": [pack.to_json() for pack in self.packs],
        }


def make_plan(
    study: Study,
    *,
    models: Mapping[str, ModelFacts],
    data: Mapping[DataKey, DataFacts],
    rate: Rate,
    tokens_per_microbatch: int = DEFAULT_TOKENS_PER_MICROBATCH,
) -> Plan:
    """All trials of the study with their costs.

    Raises:
        StudyError: what `plan_trials` refuses.
        ModelError: a target that matches no layer, or a rank above a layer's width.
    """
    trials = plan_trials(study, models=models, data=data)
    if not trials:
        raise StudyError(f"study {study.study!r} plans no trial")
    cost_of = _cached_cost(models, data, rate, tokens_per_microbatch)
    costs = tuple(cost_of(trial) for trial in trials)
    cells = {cell_key(trial) for trial in trials}
    return Plan(
        study=study,
        trials=trials,
        costs=costs,
        num_cells=len(cells),
        num_updates=sum(trial.num_updates for trial in trials),
        tokens=math.fsum(cost.num_tokens for cost in costs),
        flops=math.fsum(cost.flops for cost in costs),
        hours=math.fsum(cost.seconds for cost in costs) / 3600,
        device=rate.device,
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs),
        disk_bytes=_disk_bytes(study, costs, num_cells=len(cells)),
        detectable_effect=detectable_effect(study),
        provisional=any(trial.provisional for trial in trials),
        packs=(
            plan_packs(trials, costs, models=models, data=data, memory_bytes=rate.memory_bytes)
            if rate.memory_bytes is not None
            else ()
        ),
    )


def detectable_effect(study: Study, *, discordance: float = 0.2) -> float | None:
    """The smallest true difference in accuracy that is found with 80% power at the 5% level.

    (z_.975 + z_.8) sqrt(discordance / n): two adapters answer the same n questions and disagree on
    a share `discordance` of them (0.2 is an assumption; 5 to 20% are usual). Seeds are left out:
    noise between them makes the true figure larger. None without a task of known size.
    """
    sizes = [
        min(task.questions or NUM_QUESTIONS[task.name], NUM_QUESTIONS[task.name])
        for task in study.evaluate.tasks
        if task.name in NUM_QUESTIONS
    ]
    return (1.959964 + 0.841621) * math.sqrt(discordance / max(sizes)) if sizes else None


def _cached_cost(
    models: Mapping[str, ModelFacts],
    data: Mapping[DataKey, DataFacts],
    rate: Rate,
    tokens_per_microbatch: int,
) -> Callable[[Trial], TrialCost]:
    """Trials that differ in seed, LR or schedule cost the same: many trials, few computations."""
    known = dict[tuple[object, ...], TrialCost]()

    def cost_of(trial: Trial) -> TrialCost:
        key = (
            trial.model,
            trial.rows,
            trial.method,
            trial.rank,
            trial.batch_size,
            trial.num_samples,
        )
        if key not in known:
            known[key] = trial_cost(
                trial,
                model=models[trial.model],
                data=data[trial.model, trial.rows],
                rate=rate,
                tokens_per_microbatch=tokens_per_microbatch,
            )
        return known[key]

    return cost_of


def _disk_bytes(study: Study, costs: tuple[TrialCost, ...], *, num_cells: int) -> int:
    """Adapters kept, by the largest one, and about 4 KiB a trial in the database.

    While a cell is being trained all of its adapters are there.
    """
    in_a_cell = math.ceil(len(costs) / num_cells)
    kept = {"none": 0, "best": num_cells + in_a_cell, "all": len(costs)}[study.keep_adapters]
    return kept * max(cost.adapter_bytes for cost in costs) + 4096 * len(costs)

"""The plan of a study: its trials and what they cost all together. Changes nothing."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from loratune.errors import StudyError
from loratune.planning.cost import Rate, TrialCost, trial_cost
from loratune.planning.packs import PlannedPack, plan_packs
from loratune.planning.search_space import most_trials
from loratune.planning.trials import DataKey, plan_trials, siblings
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.identity import cell_key
from loratune.study.schema import Study

DEFAULT_TOKENS_PER_MICROBATCH = 16_384

# Questions of the test sets, for the smallest difference that a study can detect.
NUM_QUESTIONS = {"gsm8k": 1319, "humaneval": 164}


@dataclass(frozen=True)
class Plan:
    """The trials in order and the totals of their costs.

    `num_further_trials` is how many the study asks for once outcomes are known, where no best LR
    lies at an edge, and how many an adaptive search may train at most: the totals count them,
    `trials` does not hold them. `hours` is the time of one
    device at `device`'s rate, one trial after another; `packs` are the planned trials as the packed
    engine trains them, on an H100: empty where the rate is of another device.
    `detectable_effect` is a fraction (0.03 = 3 points) or None where no test task with a known size
    is scored; `provisional` says that model or data were declared, so that ids will change.
    """

    study: Study
    trials: tuple[Trial, ...]
    costs: tuple[TrialCost, ...]
    models: Mapping[str, ModelFacts]
    num_cells: int
    num_further_trials: int
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

    def siblings(self, trial: Trial, points: Iterable[tuple[float, int]]) -> tuple[Trial, ...]:
        """The trials of a planned trial's cell at other points, each an (LR, seed)."""
        return siblings(trial, points, model=self.models[trial.model])

    def to_json(self) -> dict[str, object]:
        """The totals under the names that others rely on."""
        return {
            "study": self.study.study,
            "num_trials": len(self.trials) + self.num_further_trials,
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
    cells = dict[tuple[object, ...], tuple[Trial, TrialCost]]()
    for trial, cost in zip(trials, costs, strict=True):
        cells.setdefault(cell_key(trial), (trial, cost))
    further = _further_trials(study, num_trials=len(trials), num_cells=len(cells))
    # Which batch size gets how many of them nobody knows: an equal share for each.
    more = further / len(cells)
    once = tuple(cells.values())
    return Plan(
        study=study,
        trials=trials,
        costs=costs,
        models=models,
        num_cells=len(cells),
        num_further_trials=further,
        num_updates=sum(trial.num_updates for trial in trials)
        + round(more * sum(trial.num_updates for trial, _ in once)),
        tokens=math.fsum(cost.num_tokens for cost in costs)
        + more * math.fsum(cost.num_tokens for _, cost in once),
        flops=math.fsum(cost.flops for cost in costs)
        + more * math.fsum(cost.flops for _, cost in once),
        hours=(
            math.fsum(cost.seconds for cost in costs)
            + more * math.fsum(cost.seconds for _, cost in once)
        )
        / 3600,
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


def _further_trials(study: Study, *, num_trials: int, num_cells: int) -> int:
    """How many trials outcomes will call for, or may at most."""
    num_curves = num_cells // len(study.batch_size)
    fresh = study.seeds.confirm * num_curves
    if study.learning_rate.search is not None:
        return num_curves * most_trials(study) - num_trials + fresh
    num_rates = min(3, len(study.learning_rates()))  # the best one and its neighbours
    return study.seeds.around_best * num_rates * num_cells + fresh


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

    While a cell is being trained, or a curve searched, all of its adapters are there.
    """
    in_a_cell = math.ceil(len(costs) / num_cells)
    if study.learning_rate.search is not None:
        in_a_cell = most_trials(study)
    kept = {"none": 0, "best": num_cells + in_a_cell, "all": len(costs)}[study.keep_adapters]
    return kept * max(cost.adapter_bytes for cost in costs) + 4096 * len(costs)

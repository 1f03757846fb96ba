"""The plan of a study: its trials and what they cost all together. Changes nothing."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from loratune.errors import StudyError
from loratune.planning.alternatives import Alternative, adaptive_alternative
from loratune.planning.cost import Rate, TrialCost, trial_cost
from loratune.planning.packs import PlannedPack, plan_packs
from loratune.planning.power import ASSUMED_NOISE, DifferenceNoise, StudyPower, study_power
from loratune.planning.probes import ProbeTotals, probe_totals
from loratune.planning.search_space import most_trials
from loratune.planning.trials import DataKey, plan_trials, siblings
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.identity import cell_key
from loratune.study.schema import VALIDATION, Study

DEFAULT_TOKENS_PER_MICROBATCH = 16_384

# Questions of the test sets, for the smallest difference that a study can detect.
NUM_QUESTIONS = {"gsm8k": 1319, "humaneval": 164, "demo": 512}
# What the plan says how to resolve: one point of accuracy, and 0.01 nats of loss (0.5% of a loss
# of 2, or 2% of one of 0.5).
ACCURACY_TARGET = 0.01
LOSS_TARGET = 0.01
LOSS_METRIC = "validation_loss"


@dataclass(frozen=True)
class Plan:
    """The trials in order and the totals of their costs.

    `num_further_trials` is how many the study asks for once outcomes are known, where no best LR
    lies at an edge, and how many an adaptive search may train at most: the totals count them,
    `trials` does not hold them. `hours` is the time of one
    device at `device`'s rate, one trial after another; `packs` are the planned trials as the packed
    engine trains them, on an H100: empty where the rate is of another device.
    `alternatives` are cheaper versions of the study: by an adaptive search, and, where the caller
    adds it, by a proxy.
    `power` says what differences between methods the study can show, by metric;
    `detectable_effect` is that of the accuracy with the most questions, a fraction (0.03 = 3
    points), None where no test task with a known size is scored or seeds are too few. `provisional`
    says that model or data were declared, so that ids will change.
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
    power: tuple[StudyPower, ...]
    provisional: bool
    packs: tuple[PlannedPack, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    def siblings(self, trial: Trial, points: Iterable[tuple[float, int]]) -> tuple[Trial, ...]:
        """The trials of a planned trial's cell at other points, each an (LR, seed)."""
        return siblings(trial, points, model=self.models[trial.model])

    def probes(self) -> ProbeTotals | None:
        """What the noise scale takes over the planned trials; None where it is not asked for.

        It is not in the totals: how many outcomes call for further trials nobody knows before.
        """
        if self.study.noise_scale is None:
            return None
        schedule, held_out = self.study.noise_scale.schedule(), self.study.data.validation
        return probe_totals(
            self.trials,
            schedule,
            # Rows of a file of its own are counted when they are read: all that is asked for.
            num_validation_rows=(
                0 if held_out is None else held_out.rows or schedule.held_out_rows or 0
            ),
            tokens_per_row=[
                cost.num_tokens / trial.num_samples
                for trial, cost in zip(self.trials, self.costs, strict=True)
            ],
            flops_per_row=[
                cost.flops / trial.num_samples
                for trial, cost in zip(self.trials, self.costs, strict=True)
            ],
        )

    @property
    def detectable_effect(self) -> float | None:
        """See the class."""
        accuracies = [one for one in self.power if one.num_questions is not None]
        if not accuracies:
            return None
        return max(accuracies, key=lambda one: one.num_questions or 0).detectable_effect

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
            "noise_probes": asdict(probes) if (probes := self.probes()) else None,
            "detectable_effect": self.detectable_effect,
            "provisional": self.provisional,
            "packs": [pack.to_json() for pack in self.packs],
            "alternatives": [one.to_json() for one in self.alternatives],
            "power": [
                {**asdict(one), "questions_needed_with": dict(one.questions_needed_with)}
                for one in self.power
            ],
        }


def make_plan(
    study: Study,
    *,
    models: Mapping[str, ModelFacts],
    data: Mapping[DataKey, DataFacts],
    rate: Rate,
    tokens_per_microbatch: int = DEFAULT_TOKENS_PER_MICROBATCH,
    noise: Mapping[str, DifferenceNoise] = MappingProxyType({}),
) -> Plan:
    """All trials of the study with their costs; `noise` is for `plan_power`.

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
    flops = math.fsum(cost.flops for cost in costs) + more * math.fsum(
        cost.flops for _, cost in once
    )
    adaptive = adaptive_alternative(study, trials, costs, flops=flops)
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
        flops=flops,
        hours=(
            math.fsum(cost.seconds for cost in costs)
            + more * math.fsum(cost.seconds for _, cost in once)
        )
        / 3600,
        device=rate.device,
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs),
        disk_bytes=_disk_bytes(study, costs, num_cells=len(cells)),
        power=plan_power(study, noise),
        provisional=any(trial.provisional for trial in trials),
        packs=(
            plan_packs(
                trials,
                costs,
                models=models,
                data=data,
                memory_bytes=rate.memory_bytes,
                probed=study.noise_scale is not None,
            )
            if rate.memory_bytes is not None
            else ()
        ),
        alternatives=() if adaptive is None else (adaptive,),
    )


def _further_trials(study: Study, *, num_trials: int, num_cells: int) -> int:
    """How many trials outcomes will call for, or may at most."""
    num_curves = num_cells // len(study.batch_size)
    fresh = study.seeds.confirm * num_curves
    if study.learning_rate.search is not None:
        return num_curves * most_trials(study) - num_trials + fresh
    num_rates = min(3, len(study.learning_rates()))  # the best one and its neighbours
    return study.seeds.around_best * num_rates * num_cells + fresh


def plan_power(
    study: Study, noise: Mapping[str, DifferenceNoise] = MappingProxyType({})
) -> tuple[StudyPower, ...]:
    """What the study can show of the difference between two methods, by metric.

    Args:
        study: its seeds, its test tasks of known size, its held-out rows where they are asked.
        noise: measured noise by metric name (`analyse.noise`); an accuracy without one is planned
            with `power.ASSUMED_NOISE`, a loss without one has no power that could be told.
    """
    found = list[StudyPower]()
    if LOSS_METRIC in noise:
        known = noise[LOSS_METRIC]
        found.append(
            study_power(
                LOSS_METRIC,
                known,
                num_seeds=study.seeds.num_compared,
                num_questions=None,
                target=LOSS_TARGET,
            )
        )
    for task, num_questions in _questions(study).items():
        found.append(
            study_power(
                f"{task}_accuracy",
                noise.get(f"{task}_accuracy", ASSUMED_NOISE),
                num_seeds=study.seeds.num_compared,
                num_questions=num_questions,
                target=ACCURACY_TARGET,
            )
        )
    return tuple(found)


def _questions(study: Study) -> dict[str, int]:
    """The scored tasks whose number of questions is known, and that number."""
    sizes = dict[str, int]()
    held_out = None if study.data.validation is None else study.data.validation.rows
    asked = {task.name: task.questions for task in study.evaluate.tasks}
    for name in study.scored_tasks():
        limits = [asked.get(name), held_out if name == VALIDATION else NUM_QUESTIONS.get(name)]
        known = [limit for limit in limits if limit is not None]
        if known:
            sizes[name] = min(known)
    return sizes


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

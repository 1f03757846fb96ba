"""A plan in plain words, for the terminal."""

from collections.abc import Iterable

from loratune.planning.alternatives import Alternative
from loratune.planning.build import Plan
from loratune.planning.packs import PlannedPack
from loratune.planning.power import StudyPower
from loratune.planning.search_space import USUAL_SHARE, most_trials
from loratune.records import Trial


def plan_text(plan: Plan, *, list_trials: bool) -> str:
    """The grid, what it costs, and what is only assumed; one line a trial where asked for."""
    study = plan.study
    trials = plan.trials
    lines = [
        f"study {study.study}: {len(trials):,} trials in {plan.num_cells:,} cells "
        "(a cell: all trials that differ only in LR and seed)",
        *_further(plan),
        "",
        f"  model          {_listed(trial.model for trial in trials)}",
        f"  methods        {_listed(trial.method.name for trial in trials)}",
        f"  rank           {_listed(trial.rank for trial in trials)}",
        f"  training rows  {_listed(trial.num_train_rows for trial in trials)}",
        f"  batch size     {_listed(trial.batch_size for trial in trials)}",
        f"  learning rate  {_rates(plan)}",
        f"  seeds          {_listed(trial.seed for trial in trials)}",
        f"  updates        {_spread([trial.num_updates for trial in trials])} a trial, "
        f"{plan.num_updates:,} in all",
        "",
        f"  tokens         {plan.tokens:.3g}",
        f"  FLOPs          {plan.flops:.3g}",
        f"  hours          {_hours(plan.hours)} on {plan.device}",
        f"  peak memory    {plan.peak_memory_bytes / 2**30:.1f} GiB (an estimate)",
        f"  disk           {plan.disk_bytes / 2**30:.2f} GiB",
    ]
    probes = plan.probes()
    if probes is not None:
        lines.append(
            f"  noise scale    {probes.num_train:,} probes of training rows, "
            f"{probes.num_held_out:,} of held-out rows; besides the above "
            f"{probes.num_rows_apart:,} rows, {probes.tokens:.3g} tokens, {probes.flops:.3g} FLOPs"
        )
    lines += map(_pack_line, plan.packs)
    if plan.alternatives:
        lines += ["", "  the same question by", *map(_alternative_line, plan.alternatives)]
    for one in plan.power:
        lines += ["", *_power_lines(one)]
    if not plan.power:
        lines += [
            "",
            "  no power figure: how much seeds move this loss is not known beforehand; --like DIR "
            "takes it from a results folder",
        ]
    if plan.provisional:
        lines += ["", "Trial ids are provisional: model or data were declared, not read."]
    if list_trials:
        lines += ["", *map(_trial_line, trials)]
    return "\n".join(lines)


def _further(plan: Plan) -> list[str]:
    """What outcomes will call for; it stands in the totals."""
    seeds, extend = plan.study.seeds, plan.study.learning_rate.extend
    lines = list[str]()
    if plan.study.learning_rate.search is not None:
        most = most_trials(plan.study)
        lines.append(
            f"and up to {plan.num_further_trials:,} more that an adaptive search proposes, at most "
            f"{most} a curve, fresh seeds apart (all counted here; usually "
            f"{100 * USUAL_SHARE:.0f}% of them are enough)"
        )
    elif plan.num_further_trials:
        lines.append(
            f"and {plan.num_further_trials:,} more once outcomes are known: {seeds.around_best} "
            f"further seeds around each cell's best LR, {seeds.confirm} fresh ones for each "
            "curve's best cell"
        )
    if extend:
        lines.append(
            f"a best LR at an end of the grid adds up to {extend} beyond it (not counted here)"
        )
    return lines


def _alternative_line(one: Alternative) -> str:
    """What an adaptive search or a proxy would cost in the place of the study."""
    name = "adaptive search" if one.kind == "adaptive" else "loratune tune"
    most = "" if one.most_trials is None else f" (at most {one.most_trials:,})"
    return (
        f"  {name:<15} about {one.num_trials:,} trials{most}, {one.flops:.2g} FLOPs "
        f"({100 * one.share:.2g}% of the above), {_hours(one.hours)} hours: {one.basis}"
    )


def _power_lines(one: StudyPower) -> list[str]:
    """What differences between two methods can be found, and what would resolve a small one."""
    name = one.metric.replace("_", " ")
    sample = f"{one.num_seeds} {'seed' if one.num_seeds == 1 else 'seeds'}"
    if one.num_questions is not None:
        sample += f", {one.num_questions:,} questions"
    target = _effect(one.target, one)
    noise = f"  noise          {one.noise}"
    if one.detectable_effect is None or one.called_effect is None:
        return [
            f"  {name}: no difference between methods can be shown with {sample}; "
            "write seeds: 5 in the study",
            noise,
        ]
    lines = [
        f"  {name}, difference between two methods with {sample}:",
        f"  detectable     {_effect(one.detectable_effect, one)} (80% power; compare calls it one "
        f"as often from {_effect(one.called_effect, one)} on)",
    ]
    if one.num_questions is None:
        lines.append(f"  {target} takes {_count(one.seeds_needed, 'seeds')}")
    else:
        lines += [
            f"  {target} takes {_count(one.seeds_needed, 'seeds')} with these questions, "
            f"{_count(one.questions_needed, 'questions')} with these seeds,",
            "  "
            + ", ".join(
                f"{_count(questions, 'questions')} with {seeds} seeds"
                for seeds, questions in one.questions_needed_with
            ),
        ]
    return [*lines, noise]


def _rates(plan: Plan) -> str:
    rates = plan.study.learning_rate
    if rates.search is not None:
        return f"searched between {rates.low:g} and {rates.high:g}"
    return _listed(f"{trial.learning_rate:g}" for trial in plan.trials)


def _effect(value: float, one: StudyPower) -> str:
    if one.num_questions is None:
        return f"{value:.2g} nats"
    points = f"{100 * value:.2g}"
    return f"{points} point" if points == "1" else f"{points} points"


def _count(value: int | None, what: str) -> str:
    return f"more {what} than can be had" if value is None else f"{value:,} {what}"


def _trial_line(trial: Trial) -> str:
    return (
        f"{trial.trial_id}  {trial.model}  {trial.method.name}  r={trial.rank}  "
        f"alpha={trial.alpha:g}  rows={trial.num_train_rows}  batch={trial.batch_size}  "
        f"lr={trial.learning_rate:g}  seed={trial.seed}  updates={trial.num_updates}  "
        f"warmup={trial.warmup_steps}  last_batch={trial.last_batch_size}"
    )


def _pack_line(pack: PlannedPack) -> str:
    shape = pack.shape
    checkpointed = ", checkpointed" if shape.gradient_checkpointing else ""
    return (
        f"  packed         {pack.num_trials:,} trials of {pack.model} in {shape.num_slots} slots, "
        f"{shape.tokens_per_step:,} tokens a step{checkpointed}: "
        f"{pack.peak_memory_bytes / 2**30:.1f} GiB, {_hours(pack.hours)} hours of full steps"
    )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _spread(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"

"""A study and its facts to the ordered trials, each with every derived number and its id.

Order: model, N, protocol, schedule, beta2, method, rank, alpha, batch size, seed, LR. A cell's
trials stand together, so that its best one is known, and the other adapters can go, before the next
cell begins.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from loratune.errors import StudyError
from loratune.planning.cost import QUANTISED_BYTES
from loratune.planning.horizon import horizon, warmup_steps
from loratune.planning.targets import check_rank, matched_linears
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.identity import IDENTITY_VERSION, content_id
from loratune.study.methods import describe
from loratune.study.schema import Beta2, Optimizer, Study

DataKey = tuple[str, int | None]


def plan_trials(
    study: Study,
    *,
    models: Mapping[str, ModelFacts],
    data: Mapping[DataKey, DataFacts],
) -> tuple[Trial, ...]:
    """Every trial of the study, in the order in which they are run, without repeats.

    `models` is keyed by the study's own names of the models, `data` by (model, rows): token counts
    depend on the tokenizer.

    Raises:
        StudyError: a batch size above the number of rows, a warm-up as long as the training, or a
            method that cannot train over a base in the study's precision.
        ModelError: a target that matches no layer, or a rank above a layer's width.
    """
    trials = dict[str, Trial]()
    for trial in _crossed(study, models, data):
        trials.setdefault(trial.trial_id, trial)
    return tuple(trials.values())


def _crossed(
    study: Study, models: Mapping[str, ModelFacts], data: Mapping[DataKey, DataFacts]
) -> Iterator[Trial]:
    if study.precision in QUANTISED_BYTES:
        _check_methods(study)
    rates = study.learning_rates()
    optimizer = study.optimizer
    adapters = [
        (method, rank, alpha, describe(method.name).scale_of(rank=rank, alpha=alpha))
        for method, rank, alpha in study.adapters()
    ]
    for source, rows in product(study.model, study.data.rows):
        model, facts = models[source], data[source, rows]
        for rank in {rank for _, rank, _, _ in adapters}:
            check_rank(model, study.targets, rank=rank)
        for protocol, schedule, rule in product(study.protocol, study.schedule, optimizer.beta2):
            horizons = {
                size: horizon(protocol, num_train_rows=facts.num_train_rows, batch_size=size)
                for size in study.batch_size
            }
            warmups = {
                size: warmup_steps(schedule, num_updates=length.num_updates)
                for size, length in horizons.items()
            }
            beta2s = {size: _beta2(rule, optimizer, facts, size) for size in study.batch_size}
            for (method, rank, alpha, scale), size in product(adapters, study.batch_size):
                length = horizons[size]
                first = Trial(
                    trial_id="",  # It takes what follows, and an LR and a seed.
                    provisional=model.provisional or facts.provisional,
                    model=source,
                    model_fingerprint=model.fingerprint,
                    precision=study.precision,
                    data_fingerprint=facts.fingerprint,
                    rows=rows,
                    num_train_rows=facts.num_train_rows,
                    method=method,
                    rank=rank,
                    alpha=alpha,
                    scale=scale,
                    targets=study.targets,
                    dropout=study.dropout,
                    batch_size=size,
                    learning_rate=rates[0],
                    seed=study.seeds.grid[0],
                    protocol=protocol.kind,
                    epochs=protocol.epochs,
                    steps=protocol.steps,
                    num_updates=length.num_updates,
                    last_batch_size=length.last_batch_size,
                    num_samples=length.num_samples,
                    schedule=schedule.kind,
                    warmup_steps=warmups[size],
                    optimizer=optimizer.name,
                    beta1=optimizer.betas[0],
                    beta2=beta2s[size],
                    beta2_rule=_rule_text(rule),
                    eps=optimizer.eps,
                    weight_decay=optimizer.weight_decay,
                    max_grad_norm=optimizer.max_grad_norm,
                )
                # The plan's order: by seed, then by LR.
                points = [(rate, seed) for seed in study.seeds.grid for rate in rates]
                yield from siblings(first, points, model=model)


def siblings(
    trial: Trial, points: Iterable[tuple[float, int]], *, model: ModelFacts
) -> tuple[Trial, ...]:
    """The trials of the same cell at other points, each an (LR, seed)."""
    shared = content_id(
        "shared",
        {
            "version": IDENTITY_VERSION,
            "model": trial.model_fingerprint,
            "precision": trial.precision,
            "data": trial.data_fingerprint,
            "method": [trial.method.name, dict(trial.method.options)],
            "rank": trial.rank,
            "alpha": trial.alpha,
            "targets": _canonical_targets(model, trial.targets),
            "dropout": trial.dropout,
            "optimizer": [
                trial.optimizer,
                trial.beta1,
                trial.beta2,
                trial.eps,
                trial.weight_decay,
                trial.max_grad_norm,
            ],
            "schedule": [trial.schedule, trial.warmup_steps],
            "protocol": [trial.protocol, trial.num_samples],
            "batch_size": trial.batch_size,
        },
    )
    prefix = "provisional" if trial.provisional else "trial"
    return tuple(
        replace(
            trial,
            trial_id=content_id(prefix, [shared, rate, seed]),
            learning_rate=rate,
            seed=seed,
        )
        for rate, seed in points
    )


def _check_methods(study: Study) -> None:
    for method in study.methods_chosen():
        reason = describe(method.name).not_quantised
        if reason is not None:
            raise StudyError(
                f"methods: {method.name} does not train over a base in precision "
                f"{study.precision}: {reason}; choose precision bfloat16, or leave it out"
            )


def _canonical_targets(model: ModelFacts, targets: Sequence[str]) -> list[str]:
    """One spelling for one set of layers: `all-linear` and a full list of names are the same."""
    if any("." in target for target in targets):
        return sorted(targets)
    return sorted({linear.name for linear in matched_linears(model, targets)})


def _beta2(rule: Beta2, optimizer: Optimizer, facts: DataFacts, batch_size: int) -> float:
    """beta2 as a number: 0.5^(target tokens of an update / half-life) where a half-life is given.

    Marek et al. 2025 (arXiv 2507.07101): the half-life of Adam's second moment, counted in tokens,
    is what to keep when the batch size changes; beta2' = beta2^(B'/B).
    """
    if rule.half_life_tokens is None:
        return optimizer.betas[1]
    tokens_per_update = batch_size * facts.num_target_tokens / facts.num_train_rows
    return math.pow(0.5, tokens_per_update / rule.half_life_tokens)


def _rule_text(rule: Beta2) -> str:
    if rule.half_life_tokens is None:
        return "fixed"
    return f"half_life_tokens={rule.half_life_tokens:g}"

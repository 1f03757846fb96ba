"""The answer of an adaptive search, read off the surface of all trials of a curve. No torch.

The surface spans the batch sizes that were tried and the LRs from the lowest to the highest that
was, as densely as the search's own; the expected regret is against these. What lies beyond them is
not judged. An answer is decided as the search has it, `adaptive.is_decided`; what it lacks is said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loratune.analyse.cells import Cell, answered_at, make_cells
from loratune.analyse.curves import Curve, is_search, make_curves
from loratune.planning.search_space import RATES_PER_DECADE, Space
from loratune.recommendation.adaptive import (
    DEFAULT_MARGIN,
    LEAST_SEEDS,
    MOST_NOISE,
    SURE,
    Observed,
    SearchAnswer,
    Surface,
    fit_surface,
    is_close,
    is_decided,
    search_answer,
    untried_neighbours,
)
from loratune.recommendation.early_stopping import expected_loss
from loratune.records import FINAL_STATUSES, TrialResult


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search says of one curve; `answer` is None where `undecided` says why alone."""

    answer: SearchAnswer | None
    undecided: tuple[str, ...]
    notes: tuple[str, ...]


def observed(results: Sequence[TrialResult]) -> tuple[Observed, ...]:
    """The trials that have been tried, as the search takes them.

    One that failed or ran out of memory has no loss and did not diverge. One that ended with an
    infinite loss has diverged. One that was stopped has the loss that `early_stopping` expects of
    it, for which the results need their losses.
    """
    found = list[Observed]()
    for result in results:
        outcome = result.outcome
        if outcome is None or result.purpose == "confirm":
            continue
        stopped = outcome.status == "stopped"
        loss = outcome.validation_loss if outcome.status == "done" else None
        if stopped:
            loss = expected_loss(result, results)
        if loss is not None and not 0.0 < loss < float("inf"):
            loss = None
        found.append(
            Observed(
                batch_size=result.trial.batch_size,
                learning_rate=result.trial.learning_rate,
                seed=result.trial.seed,
                loss=loss,
                useless=loss is None if stopped else outcome.status not in ("done", "diverged"),
                stopped=stopped,
            )
        )
    return tuple(found)


def answer_of_search(curve: Curve, *, margin: float) -> Searched:
    """The answer with its expected regret, or why there is none."""
    results = [result for cell in curve.cells for result in cell.results]
    left = sum(result.status not in FINAL_STATUSES for result in results)
    trials, surface, answer = _read_off(results, margin=margin)
    if surface is None or answer is None:
        return Searched(None, (_why_none(trials, left),), ())
    undecided = _still_open(surface, answer, trials, margin=margin)
    going_on = sum(result.status in ("planned", "running") for result in results)
    if going_on:
        undecided.append(
            f"the search is not over, {going_on} trials have not ended; run the same command "
            "again, which goes on where it stopped"
        )
    notes = _notes(surface, answer, trials, left)
    return Searched(answer, tuple(undecided), tuple(notes))


def _still_open(
    surface: Surface, answer: SearchAnswer, trials: Sequence[Observed], *, margin: float
) -> list[str]:
    """What an answer lacks to be decided, and what to run; empty where it is."""
    if is_decided(surface, answer, margin=margin):
        return []
    found = (
        f"after {len(trials)} trials the best found, batch size {answer.batch_size} at learning "
        f"rate {answer.learning_rate:g},"
    )
    # A search that took its own answer for good goes on only with a smaller margin.
    more = "raise max_trials, or lower margin, under learning_rate and run it again"
    reasons = list[str]()
    if answer.expected_regret >= margin:
        reasons.append(
            f"{found} is still expected to be {100 * answer.expected_regret:.2g}% worse than the "
            f"best there is, not less than {100 * margin:g}%; {more}"
        )
    elif not is_close(answer, margin=margin):
        reasons.append(
            f"{found} is within {100 * margin:g}% of the best there is with "
            f"{100 * answer.chance_within_margin:.0f}% probability, and it takes "
            f"{100 * SURE:.0f}%; {more}"
        )
    if answer.num_seeds < LEAST_SEEDS:
        reasons.append(
            f"{found} has one seed alone, and how much of it is luck cannot be told; write "
            f"seeds: 3 (2 at least) in the study if it has fewer, else {more}"
        )
    if beside := untried_neighbours(surface, answer):
        points = " and ".join(
            f"batch size {one.batch_size} at about {one.learning_rate:.2g}" for one in beside
        )
        reasons.append(
            f"{found} has untried neighbours, where the surface is a guess: {points}; {more}"
        )
    return reasons


def answer_point(results: Sequence[TrialResult]) -> tuple[int, float] | None:
    """Batch size and LR of the answer, decided or not; None where there is none.

    Args:
        results: all of one curve's search, in any order.
    """
    _, _, answer = _read_off(results, margin=DEFAULT_MARGIN)
    return None if answer is None else (answer.batch_size, answer.learning_rate)


def _read_off(
    results: Sequence[TrialResult], *, margin: float
) -> tuple[tuple[Observed, ...], Surface | None, SearchAnswer | None]:
    """One curve's trials as the search takes them, their surface, and its answer."""
    # In one order, whatever that of the results: rounding moves no answer.
    results = sorted(
        results, key=lambda one: (one.trial.batch_size, one.trial.learning_rate, one.trial.seed)
    )
    trials = observed(results)
    surface = fit_surface(trials, _searched_space(results))
    answer = None if surface is None else search_answer(surface, margin=margin)
    return trials, surface, answer


def answered(results: Sequence[TrialResult]) -> tuple[Cell, ...]:
    """`make_cells`, with the answer of every adaptive search in the cell in which it lies.

    So that what is confirmed, compared, kept and shown is what is recommended.
    """
    cells = {id(cell): cell for cell in make_cells(results)}
    for curve in make_curves(tuple(cells.values())):
        if not is_search(curve):
            continue
        point = answer_point([result for cell in curve.cells for result in cell.results])
        for cell in curve.cells:
            if point is not None and cell.trial.batch_size == point[0]:
                cells[id(cell)] = answered_at(cell, point[1])
    return tuple(cells.values())


def _searched_space(results: Sequence[TrialResult]) -> Space:
    """Every batch size with the LRs that were tried, and with others where these lie far apart.

    Far apart is more than a step of the search's. Every point may have every seed.
    """
    sizes = sorted({result.trial.batch_size for result in results})
    tried = sorted({result.trial.learning_rate for result in results})
    rates = [*tried]
    for low, high in pairwise(tried):
        parts = math.ceil(RATES_PER_DECADE * math.log10(high / low) - 1e-6)
        rates += [low * (high / low) ** (part / parts) for part in range(1, parts)]
    points = tuple((size, rate) for size in sizes for rate in sorted(rates))
    seeds = tuple(sorted({result.trial.seed for result in results}))
    return Space(points, (seeds,) * len(points))


def _why_none(trials: Sequence[Observed], left: int) -> str:
    if left:
        return f"{left} trials of the search have no outcome; finish the study with `loratune run`"
    diverged = sum(one.loss is None and not one.useless for one in trials)
    if not diverged:
        return (
            f"{len(trials)} trials have ended, too few to say anything of the others; raise "
            "max_trials under learning_rate and run it again"
        )
    lowest = min(one.learning_rate for one in trials)
    return (
        f"{diverged} of {len(trials)} trials diverged, and none is left that could be the answer; "
        f"try learning rates below the lowest one, {lowest:g}"
    )


def _notes(
    surface: Surface, answer: SearchAnswer, trials: Sequence[Observed], left: int
) -> list[str]:
    seeds = "1 seed" if answer.num_seeds == 1 else f"{answer.num_seeds} seeds"
    notes = [
        f"expected validation loss there: {answer.expected_loss:.4g} (95% interval "
        f"{answer.loss_low:.4g} to {answer.loss_high:.4g}; {seeds}, and the trials around it); "
        f"expected regret {100 * answer.expected_regret:.2g}% of the loss, from a Gaussian process "
        f"through {len(trials)} trials"
    ]
    if surface.noise_is_bounded:
        notes.append(
            f"the seeds' noise is the most that the model allows, {100 * MOST_NOISE:g}% of the "
            "loss: it may be more, and the answer less sure than is said; run more seeds"
        )
    rates = sorted({one.learning_rate for one in trials})
    if answer.learning_rate in (rates[0], rates[-1]):
        end = ("lowest", "lower") if answer.learning_rate == rates[0] else ("highest", "higher")
        notes.append(_at_end(f"learning rate {answer.learning_rate:g}", *end))
    sizes = sorted({one.batch_size for one in trials})
    if len(sizes) > 1 and answer.batch_size in (sizes[0], sizes[-1]):
        end = ("smallest", "smaller") if answer.batch_size == sizes[0] else ("largest", "larger")
        notes.append(_at_end(f"batch size {answer.batch_size}", *end))
    if left:
        notes.append(f"{left} trials have no outcome yet; the answer may change")
    diverged = sum(one.loss is None and not one.useless for one in trials)
    stopped = sum(one.stopped for one in trials)
    if stopped:
        notes.append(
            f"{stopped} of the trials were stopped half-way, far above the best ones there; what "
            "they would have reached is estimated, and a batch size whose best trial was stopped "
            "has no score"
        )
    if diverged:
        notes.append(f"{diverged} of the trials diverged; the search kept away from there")
    return notes


def _at_end(what: str, end: str, beyond: str) -> str:
    return f"{what} is the {end} that was tried; a {beyond} one may be better"

"""Which trials of an adaptive search stop half-way: those that can no longer be its answer.

The rule looks once, when half of a trial's updates are made, at the mean of its training losses
over the last tenth of all updates. It stops the trial where that lies more than WORSE above the
worst of the good trials there: those finished ones of the same curve whose validation loss is
within GOOD of the best. So a late bloomer that finished well (a high LR under a cosine schedule
looks bad until late) makes room for others like it. Only trials of earlier rounds count, so that
what is stopped depends neither on the order in which a pack ends nor on where a study was
interrupted.

How often it stops a trial that would have ended near the best, and what it saves, was measured on
recorded curves: `benchmarks/early_stopping.py`, docs/adaptive-search.md. Training losses of one
pass over the data stand in for validation losses; over many passes they are lower, for all alike.

A stopped trial is data: it is taken to have ended as far above the best trial, relatively, as it
was half-way. Most catch up a little, which matters little so far off.

Pure: a function of the results, whatever their order.
"""

import math
from collections.abc import Sequence

from loratune.planning.bar import Bar, half_way_loss, stretch_before_half_way
from loratune.records import TrialResult

# Relative.
GOOD = 0.02
WORSE = 0.2
# Finished trials of the curve before anything is stopped.
FEWEST_KNOWN = 3
# (validation loss, half-way loss) of a trial that trained to its end.
Finished = tuple[float, float]

# Below so many updates there is nothing to save, and a stretch is one batch.
FEWEST_UPDATES = 4


def bar(num_updates: int, known: Sequence[TrialResult]) -> Bar | None:
    """What a trial of so many updates must have reached half-way; None: nothing is asked of it.

    Args:
        num_updates: of the trial.
        known: results of its curve's earlier trials, with their losses.
    """
    allowed = highest_allowed(_finished(known))
    if num_updates < FEWEST_UPDATES or allowed is None:
        return None
    begin, end = stretch_before_half_way(num_updates)
    return Bar(begin=begin, end=end, loss=allowed)


def highest_allowed(finished: Sequence[Finished]) -> float | None:
    """The half-way loss above which a trial is stopped; None where too few are known to say."""
    if len(finished) < FEWEST_KNOWN:
        return None
    best = min(final for final, _ in finished)
    return (1 + WORSE) * max(half for final, half in finished if final <= best * (1 + GOOD))


def expected_loss(stopped: TrialResult, known: Sequence[TrialResult]) -> float | None:
    """The validation loss that a stopped trial is taken to have had; None where nothing says it.

    Args:
        stopped: with its losses.
        known: results of its curve, with their losses.
    """
    finished = _finished(known)
    half_way = half_way_loss(stopped)
    if not finished or half_way is None:
        return None
    return scaled_from_the_best(half_way, finished)


def scaled_from_the_best(half_way: float, finished: Sequence[Finished]) -> float:
    """The loss in which a half-way loss ends, if it ends as far above the best as it is there."""
    final, reached = min(finished)
    return final * half_way / reached


def _finished(results: Sequence[TrialResult]) -> list[Finished]:
    found = list[Finished]()
    for result in results:
        final = None if result.outcome is None else result.outcome.validation_loss
        half_way = half_way_loss(result)
        if result.status != "done" or final is None or half_way is None:
            continue
        if 0.0 < final < math.inf:
            found.append((final, half_way))
    return found

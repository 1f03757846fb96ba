"""The best LR of a cell read off between those that were tried.

A grid of LRs is coarse beside what an LR decides; the losses on both sides of the best one say on
which side of it the true best lies.
"""

import math

from loratune.analyse.cells import Cell
from loratune.analyse.laws.optimum import vertex


def rate_between(cell: Cell) -> float | None:
    """The cell's best LR between its neighbours, by a parabola in log LR.

    None where the best one is at an edge, or beside an LR that diverged or has no score. Over the
    seeds that all three have.
    """
    if cell.best is None:
        return None
    index = cell.rates.index(cell.best)
    if index in (0, len(cell.rates) - 1):
        return None
    around = cell.rates[index - 1 : index + 2]
    scores = [dict(zip(cell.seeds, one.seed_scores, strict=True)) for one in around]
    seeds = [s for s in cell.seeds if all(_finite(of_rate[s]) for of_rate in scores)]
    if not seeds or "diverged" in {one.verdict for one in around}:
        return None
    sign = -1.0 if cell.metric.higher_is_better else 1.0
    means = [sign * math.fsum(of_rate[s] or 0.0 for s in seeds) / len(seeds) for of_rate in scores]
    lowest = vertex([math.log(one.learning_rate) for one in around], means)
    # The seeds that all three have may like a neighbour better than all seeds do together.
    return cell.best.learning_rate if lowest is None else math.exp(lowest)


def _finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)

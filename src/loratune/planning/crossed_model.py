"""Variance and degrees of freedom of a mean over seeds and questions, from mean squares.

The crossed random-effects model without replication, for the difference d of two methods at seed s
on question q, d_sq = delta + a_s + b_q + e_sq (ANOVA estimators; Searle, Casella and McCulloch
1992, chapter 4): with M_a, M_b, M_e the mean squares of seeds, questions and the rest,

    Var(mean) = (M_a + M_b - M_e) / (S Q),

degrees of freedom by Satterthwaite (1946). Where the two methods share no seeds, each has a seed
part (M_a - M_e) / (S Q) of its own, and the questions' part is the variance over questions of the
difference of seed means. Two changes to the textbook, both measured (docs/decisions.md):

- M_a counts twice in the degrees of freedom. With few seeds a mean square that is small by luck
  makes the interval narrow *and* its degrees of freedom large; with three seeds the textbook's
  intervals cover 92% where the seeds' part is the larger one. Doubled: 93.7% or more.
- The variance is at least 5% of the questions' part: a small M_a could make it negative.

`planning.power` asks this before a study, `analyse.crossed` after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Two seeds give the model one degree of freedom for seeds: its 95% intervals then cover 90%
# (measured, docs/decisions.md).
FEWEST_SEEDS = 3
_SEED_WEIGHT = 2.0
_LEAST_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class SeedSquares:
    """Of one table of scores: the mean square of its seeds, of its residuals, and S."""

    seeds: FloatArray
    residual: FloatArray
    num_seeds: int


def variance_of_mean(
    question_part: FloatArray, num_questions: int, tables: Sequence[SeedSquares]
) -> tuple[FloatArray, FloatArray]:
    """(variance, degrees of freedom) of the difference; arrays of any one shape.

    Args:
        question_part: variance over questions of the difference of seed means, over Q; M_b / (S Q).
        num_questions: Q.
        tables: one table of paired differences, or the two methods' own where seeds differ.
    """
    variance, cautious = question_part, question_part
    spread = question_part**2 / (num_questions - 1)
    for one in tables:
        cells, df = one.num_seeds * num_questions, one.num_seeds - 1
        variance = variance + (one.seeds - one.residual) / cells
        cautious = cautious + (_SEED_WEIGHT * one.seeds - one.residual) / cells
        spread = spread + (_SEED_WEIGHT * one.seeds / cells) ** 2 / df
        spread = spread + (one.residual / cells) ** 2 / (df * (num_questions - 1))
    floor = _LEAST_SHARE * question_part
    fewest = min(one.num_seeds for one in tables) - 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        df = np.where(spread > 0.0, np.maximum(cautious, floor) ** 2 / spread, fewest)
    return np.maximum(variance, floor), np.maximum(df, fewest)

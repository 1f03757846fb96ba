"""The difference of two methods where seeds and questions both vary, with an honest interval.

Below 10 seeds by the crossed random-effects model (`planning.crossed_model` has its formulas) with
Student's quantile at Satterthwaite's degrees of freedom.

From 10 seeds on the quantile is not Student's but that of a two-way bootstrap (seeds and questions
resampled apart; Owen 2007, "The pigeonhole bootstrap"), studentised: every resample's mean is
divided by its own standard error from the same formula. Unstudentised, it counts e_sq three times
(Owen 2007) and is too narrow for few seeds.

Questions that share a source are not independent: they enter as one unit, the source's sum (the
linearised, cluster-robust form; Miller 2024, arXiv 2411.00640, section 2.2).

Nothing here knows of trials. Not covered: fewer than 3 seeds (refused), and seeds that depend on
each other.
"""

# scipy comes without types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.special import betaincinv

from loratune.analyse.intervals import CONFIDENCE, Estimate, ZeroSet, t_estimate, t_quantile
from loratune.errors import AnalysisError
from loratune.planning.crossed_model import (
    FEWEST_SEEDS,
    FloatArray,
    SeedSquares,
    variance_of_mean,
)

BOOTSTRAP_FROM = 10
NUM_RESAMPLES = 1999
# Answers of a kind below which their number is no normal variable.
FEW_ANSWERS = 10
_ZERO_SET_STEPS = 100
# A fixed stream: the same answers always give the same interval.
_BOOTSTRAP_SEED = 20_240_501


@dataclass(frozen=True, slots=True)
class Variance:
    """Estimates over leading axes: the mean, its variance, degrees of freedom."""

    value: FloatArray
    variance: FloatArray
    df: FloatArray


@dataclass(frozen=True, slots=True)
class Components:
    """The variance components of a difference, from mean squares; each at least 0."""

    seeds: float
    questions: float
    residual: float


def crossed_difference(
    first: FloatArray, second: FloatArray, *, paired: bool, sources: Sequence[int] | None = None
) -> Estimate:
    """Mean of `first` - mean of `second` with its interval over other seeds and other questions.

    Args:
        first: scores [S1, Q] of one method, such as 1 for a right answer and 0 for a wrong one.
        second: scores [S2, Q] of the other on the same questions.
        paired: row s of both is of the same seed (S1 = S2), and shares its data order.
        sources: for each question the number of its source; questions of one source are a unit.

    Raises:
        AnalysisError: fewer than 3 seeds of a method, or fewer than 2 sources.
    """
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    assert one.shape[1] == two.shape[1]
    assert not paired or one.shape == two.shape
    fewest = min(len(one), len(two))
    if fewest < FEWEST_SEEDS:
        raise AnalysisError(
            f"{fewest} seeds; it takes {FEWEST_SEEDS} to see how much seeds matter beside questions"
        )
    tables = (one - two,) if paired else (one, -two)
    if sources is not None:
        tables = tuple(_by_source(table, sources) for table in tables)
    num_units = tables[0].shape[1]
    if num_units < 2:
        raise AnalysisError(
            "all questions share one source; it takes two to see how much they vary"
        )
    plain = crossed_variance(*tables)
    value, variance, df = (float(x) for x in (plain.value, plain.variance, plain.df))
    by_model = t_estimate(
        value,
        standard_error=math.sqrt(variance),
        df=df,
        procedure="crossed model, Satterthwaite",
    )
    estimate = by_model
    if variance > 0.0 and fewest >= BOOTSTRAP_FROM:
        bootstrap = t_estimate(
            value,
            standard_error=math.sqrt(variance),
            df=df,
            procedure="two-way bootstrap",
            absolute_ts=_bootstrap_ts(tables, value),
        )
        # Where few answers differ, too many resamples hold none that does, and have no variance.
        estimate = bootstrap if math.isfinite(bootstrap.critical) else by_model
    return estimate


def not_too_certain(
    found: Estimate,
    first: FloatArray,
    second: FloatArray,
    *,
    sources: Sequence[int] | None = None,
) -> Estimate:
    """Where few answers differed, an interval at least as wide as the chance of such answers has.

    If a share d of all questions were answered differently, none of Q would be with (1 - d)^Q: 2.5%
    at d = 1 - 0.025^(1/Q) (Clopper and Pearson 1934). No variance is seen then, and little where
    one or two differ. So the half width is at least the distance from the share of answers in
    favour of one side to the farther end of its Clopper-Pearson interval, the larger of both sides.
    Answers count as the part of the seeds that gave them.

    Args:
        found: `crossed_difference` of the tables.
        first: scores from 0 to 1, [S1, Q].
        second: scores from 0 to 1, [S2, Q].
        sources: for each question the number of its source; a source counts as one question.
    """
    pooled = first.mean(axis=0) - second.mean(axis=0)
    if sources is not None:
        numbers = np.unique(np.asarray(sources), return_inverse=True)[1]
        pooled = np.bincount(numbers, weights=pooled) / np.bincount(numbers)
    num = len(pooled)
    if np.count_nonzero(pooled) >= FEW_ANSWERS and found.standard_error > 0.0:
        return found
    half = 0.0
    for count in (float(np.maximum(pooled, 0.0).sum()), float(np.maximum(-pooled, 0.0).sum())):
        high = float(betaincinv(count + 1, num - count, (1 + CONFIDENCE) / 2)) if count < num else 1
        low = float(betaincinv(count, num - count + 1, (1 - CONFIDENCE) / 2)) if count else 0.0
        half = max(half, high - count / num, count / num - low)
    if half <= found.critical * found.standard_error:
        return found
    return replace(found, standard_error=half / found.critical)


def crossed_variance(*tables: FloatArray) -> Variance:
    """The sum of the tables' means, its variance and degrees of freedom; leading axes are kept.

    Args:
        tables: [..., S, Q] each: one table of paired differences, or two of unlike seeds whose
            means add up to the difference. Questions are the same in all.
    """
    pooled: FloatArray = sum(table.mean(axis=-2) for table in tables)  # type: ignore[assignment]
    num_questions = pooled.shape[-1]
    question_part = pooled.var(axis=-1, ddof=1) / num_questions
    squares = [SeedSquares(*_mean_squares(table), table.shape[-2]) for table in tables]
    variance, df = variance_of_mean(question_part, num_questions, squares)
    return Variance(pooled.mean(axis=-1), variance, df)


def crossed_components(table: FloatArray, *, sources: Sequence[int] | None = None) -> Components:
    """The components of a table [S, Q] of paired differences; S, Q >= 2.

    With `sources` (as in `crossed_difference`, two at least) the parts of questions and of the rest
    are those of questions that were independent and told as little: Q of them give the variance of
    the mean that C sources of Q/C questions give.
    """
    num_questions = table.shape[1]
    if sources is not None:
        table = _by_source(table, sources)
    num_seeds, num_units = table.shape
    seeds, residual = (float(x) for x in _mean_squares(table))
    questions = num_seeds * float(table.mean(axis=0).var(ddof=1))
    of_a_unit = num_questions / num_units
    return Components(
        seeds=max(0.0, (seeds - residual) / num_units),
        questions=of_a_unit * max(0.0, (questions - residual) / num_seeds),
        residual=of_a_unit * residual,
    )


def crossed_zero_set(
    left: FloatArray, right: FloatArray, *, sources: Sequence[int] | None = None
) -> ZeroSet:
    """The w in [0, 1] at which the mean of (1 - w) left + w right does not differ from 0.

    `intervals.zero_set` where questions vary too: the same inversion of a two-sided 5% test, which
    is here the crossed model's, over paired differences [S, Q]; `sources` as in
    `crossed_difference`. To within 1/200 of w.
    """
    if sources is not None:
        left, right = _by_source(left, sources), _by_source(right, sources)
    weights = np.linspace(0.0, 1.0, _ZERO_SET_STEPS + 1)
    kept = list[tuple[float, float]]()
    half = 0.5 / _ZERO_SET_STEPS
    for w in weights:
        found = crossed_variance((1 - w) * left + w * right)
        allowed = t_quantile((1 + CONFIDENCE) / 2, df=float(found.df)) * math.sqrt(found.variance)
        if abs(float(found.value)) > allowed:
            continue
        low, high = max(0.0, float(w) - half), min(1.0, float(w) + half)
        if kept and math.isclose(kept[-1][1], low, abs_tol=1e-9):
            kept[-1] = (kept[-1][0], high)
        else:
            kept.append((low, high))
    return tuple(kept)


def _mean_squares(table: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(M_a of seeds, M_e of the rest) of tables [..., S, Q]."""
    num_seeds, num_questions = table.shape[-2:]
    by_seed, by_question = table.mean(axis=-1), table.mean(axis=-2)
    grand = by_seed.mean(axis=-1)
    seeds = num_questions * by_seed.var(axis=-1, ddof=1)
    total = ((table - grand[..., None, None]) ** 2).sum(axis=(-2, -1))
    rest = (
        total
        - (num_seeds - 1) * seeds
        - num_seeds * ((by_question - grand[..., None]) ** 2).sum(axis=-1)
    )
    return seeds, np.maximum(rest, 0.0) / ((num_seeds - 1) * (num_questions - 1))


def _by_source(table: FloatArray, sources: Sequence[int]) -> FloatArray:
    """[S, Q] to [S, C]: each source's summed deviations from the mean, scaled to keep the mean."""
    numbers = np.unique(np.asarray(sources), return_inverse=True)[1]
    num_sources = int(numbers.max()) + 1
    mean = table.mean()
    sums = np.zeros((len(table), num_sources))
    np.add.at(sums.T, numbers, (table - mean).T)
    return mean + sums * (num_sources / table.shape[1])


def _bootstrap_ts(tables: Sequence[FloatArray], value: float) -> FloatArray:
    """|t| of every resample, ascending."""
    num_questions = tables[0].shape[1]
    questions = _counts(num_questions, stream=0)
    means = list[FloatArray]()
    squares = list[SeedSquares]()
    pooled = np.zeros_like(questions)
    for index, table in enumerate(tables):
        seeds = _counts(len(table), stream=index + 1)
        by_question = seeds @ table / len(table)  # [B, Q]
        by_seed = questions @ table.T / num_questions  # [B, S]
        grand = (seeds * by_seed).sum(axis=1) / len(table)
        total = ((seeds @ table**2) * questions).sum(axis=1)
        size = table.size
        between_seeds = num_questions * (seeds * (by_seed - grand[:, None]) ** 2).sum(axis=1)
        between_questions = len(table) * (questions * (by_question - grand[:, None]) ** 2).sum(
            axis=1
        )
        rest = total - size * grand**2 - between_seeds - between_questions
        df = len(table) - 1
        residual = np.maximum(rest, 0.0) / (df * (num_questions - 1))
        squares.append(SeedSquares(between_seeds / df, residual, len(table)))
        means.append(grand)
        pooled += by_question
    grand = np.sum(means, axis=0)
    question_part = (questions * (pooled - grand[:, None]) ** 2).sum(axis=1) / (
        (num_questions - 1) * num_questions
    )
    variance, _ = variance_of_mean(question_part, num_questions, squares)
    with np.errstate(invalid="ignore", divide="ignore"):
        ts = np.abs(grand - value) / np.sqrt(variance)
    # A resample without any variance: nothing moved (0), or everything did (infinite).
    return np.sort(np.where(np.isnan(ts), 0.0, ts))


@cache
def _counts(num: int, *, stream: int) -> FloatArray:
    """How often each of `num` units stands in every resample: [NUM_RESAMPLES, num]."""
    draw = np.random.default_rng((_BOOTSTRAP_SEED, stream))
    drawn = draw.multinomial(num, np.full(num, 1.0 / num), size=NUM_RESAMPLES)
    return drawn.astype(np.float64)

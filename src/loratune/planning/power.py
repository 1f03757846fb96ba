"""What a comparison of two methods can show, before anything is run: power, and its inverses.

The model is that of `crossed_model`: S seeds and Q questions, both drawn anew by whoever repeats
the study. Power is that of the very test that `analyse.crossed` makes, its mean squares integrated
out numerically: the noncentral t at the expected degrees of freedom is off by up to 8 points of
power with three seeds. A difference that is *called* by `compare` must moreover reach the
detectable effect itself (see `called_effect`). Not covered: Holm's adjustment where several methods
are compared, and the choice of batch size and LR, which fresh seeds make independent of the
estimate.
"""

# scipy comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUnknownLambdaType=false

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, ndtri, stdtrit

from loratune.planning.crossed_model import (
    FEWEST_SEEDS,
    FloatArray,
    SeedSquares,
    variance_of_mean,
)

LEVEL = 0.05
POWER = 0.8
# Beyond this many degrees of freedom t is normal to 1e-5.
_NORMAL_FROM = 100_000.0
_MOST_SEEDS = 1_000
_OTHER_SEEDS = (5, 10, 20)
_MOST_QUESTIONS = 10_000_000

# Assumptions, not measurements; `--like DIR` puts measured ones in their place. 20% of the answers
# of two methods differ (5 to 20% are usual); all of it is counted as belonging to the questions,
# so that seeds don't average it out: cautious. A trial's accuracy moves by half a point from seed
# to seed beyond what its questions explain, independently for the two methods.
ASSUMED_DISCORDANCE = 0.2
ASSUMED_SEED_SD = 0.005


@dataclass(frozen=True, slots=True)
class DifferenceNoise:
    """The variance components of the difference between two methods, in squared score units.

    `seed_variance` is var_a (of the difference: twice a single method's where seeds are
    independent), `question_variance` var_b, `residual_variance` var_e; `source` says in words where
    they come from. For a loss the rows are fixed: only `seed_variance` counts.
    """

    seed_variance: float
    question_variance: float
    residual_variance: float
    source: str


ASSUMED_NOISE = DifferenceNoise(
    seed_variance=2 * ASSUMED_SEED_SD**2,
    question_variance=ASSUMED_DISCORDANCE,
    residual_variance=0.0,
    source=f"assumed: {100 * ASSUMED_DISCORDANCE:g}% of answers differ between two methods, "
    f"accuracy varies by {100 * ASSUMED_SEED_SD:g} points (SD) between seeds",
)


@dataclass(frozen=True, slots=True)
class StudyPower:
    """What one study can show under one metric, and what it would take to show `target`.

    `detectable_effect` is found, `called_effect` called a difference by `compare`, with 80% power;
    both null with too few seeds. `seeds_needed` at these questions, `questions_needed` at these
    seeds find `target`; null where no number does. `questions_needed_with` maps other numbers of
    seeds to questions. Effects are in the metric's unit; `num_questions` is None for a loss.
    """

    metric: str
    num_seeds: int
    num_questions: int | None
    noise: str
    detectable_effect: float | None
    called_effect: float | None
    target: float
    seeds_needed: int | None
    questions_needed: int | None
    questions_needed_with: tuple[tuple[int, int | None], ...]


def study_power(
    metric: str, noise: DifferenceNoise, *, num_seeds: int, num_questions: int | None, target: float
) -> StudyPower:
    """The power of a comparison of two methods with these seeds and questions."""
    ask = num_questions is not None
    return StudyPower(
        metric=metric,
        num_seeds=num_seeds,
        num_questions=num_questions,
        noise=noise.source,
        detectable_effect=study_detectable_effect(
            noise, num_seeds=num_seeds, num_questions=num_questions
        ),
        called_effect=study_called_effect(noise, num_seeds=num_seeds, num_questions=num_questions),
        target=target,
        seeds_needed=seeds_to_detect(target, noise, num_questions=num_questions),
        questions_needed=questions_to_detect(target, noise, num_seeds=num_seeds) if ask else None,
        questions_needed_with=tuple(
            (seeds, questions_to_detect(target, noise, num_seeds=seeds))
            for seeds in _OTHER_SEEDS
            if ask
        ),
    )


def critical_t(df: float, *, level: float = LEVEL) -> float:
    """The two-sided critical value of Student's t; infinite `df` is the normal's."""
    return float(ndtri(1 - level / 2) if df > _NORMAL_FROM else stdtrit(df, 1 - level / 2))


def power(effect: float, *, standard_error: float, df: float, level: float = LEVEL) -> float:
    """P(the two-sided t test rejects 0) where the true difference is `effect`."""
    return _exceeds(abs(effect) / standard_error, critical_t(df, level=level), df) + _exceeds(
        -abs(effect) / standard_error, critical_t(df, level=level), df
    )


def detectable_effect(
    standard_error: float, *, df: float, level: float = LEVEL, wanted: float = POWER
) -> float:
    """The true difference that the t test finds with power `wanted`, in `standard_error`'s unit.

    For many degrees of freedom (z_.975 + z_.8) SE = 2.80 SE; 5.9 SE with two (three seeds).
    """
    return standard_error * _multiple(df, level, wanted, critical_t(df, level=level))


def called_effect(
    standard_error: float, *, df: float, level: float = LEVEL, wanted: float = POWER
) -> float:
    """The true difference that `compare` calls one with probability `wanted`.

    It calls nothing below the detectable effect, so that an estimate must reach that, not only the
    critical value: t >= detectable / SE.
    """
    detectable = _multiple(df, level, wanted, critical_t(df, level=level))
    return standard_error * _multiple(df, level, wanted, detectable)


@cache
def _multiple(df: float, level: float, wanted: float, threshold: float) -> float:
    """The effect, in standard errors, whose t exceeds `threshold` with probability `wanted`."""

    def excess(effect: float) -> float:
        return _exceeds(effect, threshold, df) + _exceeds(-effect, threshold, df) - wanted

    root: Any = brentq(excess, 0.0, 10 * threshold + 10)
    return float(root)


def _exceeds(noncentrality: float, threshold: float, df: float) -> float:
    """P(noncentral t > threshold) = E[Phi(noncentrality - threshold s)], s^2 ~ chi2(df) / df.

    By the quantiles of s: to 1e-4 for every df, and without the NaN of scipy's nctdtr far out.
    """
    if df > _NORMAL_FROM:
        return float(ndtr(noncentrality - threshold))
    return float(ndtr(noncentrality - threshold * _scales(df)).mean())


@cache
def _scales(df: float) -> FloatArray:
    upper_tails = (np.arange(4000) + 0.5) / 4000
    return np.sqrt(chdtri(df, upper_tails) / df)


def study_detectable_effect(
    noise: DifferenceNoise, *, num_seeds: int, num_questions: int | None, wanted: float = POWER
) -> float | None:
    """The smallest true difference found with probability `wanted`; None with too few seeds.

    `num_questions` is None for a loss: then only seeds vary, and the test is the paired t test.
    """
    found = _study_effect(noise, num_seeds, num_questions, wanted, False)
    return None if math.isnan(found) else found


def study_called_effect(
    noise: DifferenceNoise, *, num_seeds: int, num_questions: int | None, wanted: float = POWER
) -> float | None:
    """The smallest true difference that `compare` calls one with probability `wanted`, or None."""
    found = _study_effect(noise, num_seeds, num_questions, wanted, True)
    return None if math.isnan(found) else found


@lru_cache(maxsize=4096)
def _study_effect(
    noise: DifferenceNoise, num_seeds: int, num_questions: int | None, wanted: float, called: bool
) -> float:
    """NaN with too few seeds."""
    effect = called_effect if called else detectable_effect
    if num_questions is None:
        if num_seeds < 2:
            return math.nan
        error = math.sqrt(noise.seed_variance / num_seeds)
        return effect(error, df=num_seeds - 1.0, wanted=wanted)
    if num_seeds < FEWEST_SEEDS:
        return math.nan
    s, q = num_seeds, num_questions
    residual = noise.residual_variance
    seeds, questions = residual + q * noise.seed_variance, residual + s * noise.question_variance
    error = math.sqrt((seeds + questions - residual) / (s * q))
    if error == 0.0:
        return 0.0
    # Mean squares are independent chi2(df) / df times their expectations, and independent of the
    # mean, where all parts are normal.
    draws = _uniforms()
    square = [
        expected * chdtri(df, draws[:, index]) / df
        for index, (expected, df) in enumerate(
            ((seeds, s - 1), (questions, q - 1), (residual, (s - 1) * (q - 1)))
        )
    ]
    variance, df = variance_of_mean(square[1] / (s * q), q, [SeedSquares(square[0], square[2], s)])
    multiple = detectable_multiples(df) if called else stdtrit(df, 1 - LEVEL / 2)
    threshold = multiple * np.sqrt(variance) / error

    def excess(effect: float) -> float:
        return float((ndtr(effect - threshold) + ndtr(-effect - threshold)).mean()) - wanted

    root: Any = brentq(excess, 0.0, 10 * float(threshold.max()) + 10)
    return error * float(root)


@cache
def _uniforms() -> FloatArray:
    """4,096 points that fill the unit cube evenly (Sobol), the same every time."""
    from scipy.stats import qmc  # half a second to import, which other commands need not pay

    return qmc.Sobol(3, scramble=False).random(4096) + 0.5 / 4096


def detectable_multiples(df: FloatArray) -> FloatArray:
    """`detectable_effect` of standard error 1 at many `df` at once, interpolated over 1 / df."""
    knots, known = _known_multiples()
    return np.interp(1 / df, knots, known)


@cache
def _known_multiples() -> tuple[FloatArray, FloatArray]:
    """1 / df, ascending, and the multiple there."""
    df = np.array([1e6, 1e3, *np.geomspace(100.0, 1.0, 40)])
    return 1 / df, np.array([detectable_effect(1.0, df=float(one)) for one in df])


def seeds_to_detect(
    effect: float, noise: DifferenceNoise, *, num_questions: int | None
) -> int | None:
    """The fewest seeds with which `effect` is found with 80% power; None where 1,000 don't do.

    Seeds don't average out the noise of the questions: None says that more questions are needed.
    """
    fewest = 2 if num_questions is None else FEWEST_SEEDS

    def finds(num_seeds: int) -> bool:
        found = study_detectable_effect(noise, num_seeds=num_seeds, num_questions=num_questions)
        return found is not None and found <= effect

    return _smallest(finds, fewest, _MOST_SEEDS)


def questions_to_detect(effect: float, noise: DifferenceNoise, *, num_seeds: int) -> int | None:
    """The fewest questions with which `effect` is found with 80% power.

    None where 10 million don't do (seeds vary too much), or with fewer than 3 seeds.
    """
    if num_seeds < FEWEST_SEEDS:
        return None

    def finds(num_questions: int) -> bool:
        found = study_detectable_effect(noise, num_seeds=num_seeds, num_questions=num_questions)
        return found is not None and found <= effect

    return _smallest(finds, 2, _MOST_QUESTIONS)


def miller_sample_size(
    effect: float,
    *,
    question_variance: float,
    variance_a: float = 0.0,
    variance_b: float = 0.0,
    samples_a: int = 1,
    samples_b: int = 1,
    level: float = LEVEL,
    wanted: float = POWER,
) -> int:
    """Questions that a paired comparison of two models needs (Miller 2024, arXiv 2411.00640, (9)).

    n = (z_(level/2) + z_(1-wanted))^2 (w^2 + s_A^2 / K_A + s_B^2 / K_B) / effect^2, where w^2 is
    the variance over questions of the difference of expected scores, s^2 the mean variance of a
    model's answers to one question and K how often each is asked. Seeds of training are not in it.
    """
    total = question_variance + variance_a / samples_a + variance_b / samples_b
    return math.ceil((_z(1 - level / 2) + _z(wanted)) ** 2 * total / effect**2)


def paired_detectable_effect(discordance: float, *, num_questions: int) -> float:
    """(z_.975 + z_.8) sqrt(discordance / n): two adapters, one seed each, the same questions."""
    return (_z(1 - LEVEL / 2) + _z(POWER)) * math.sqrt(discordance / num_questions)


def unpaired_detectable_effect(accuracy: float, *, num_questions: int) -> float:
    """(z_.975 + z_.8) sqrt(2 p (1 - p) / n): two adapters on n questions each, not the same."""
    return paired_detectable_effect(2 * accuracy * (1 - accuracy), num_questions=num_questions)


def questions_for_discordance(effect: float, *, discordance: float) -> float:
    """n at which `paired_detectable_effect` is `effect`; not rounded."""
    return (_z(1 - LEVEL / 2) + _z(POWER)) ** 2 * discordance / effect**2


def _z(probability: float) -> float:
    return float(ndtri(probability))


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number of low..high at which a condition holds that stays once it holds."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low

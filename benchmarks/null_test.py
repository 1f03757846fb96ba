"""Do the decisions hold? One method against itself, coverage of the intervals, realised power.

Simulated answers to questions with a known truth; vectorised, seeded, no training. `decisions.py`
prints the tables of docs/decisions.md from these functions, and the tests call them with fewer
simulations. Same seed, same numbers.

The model of an answer: configuration c (a batch size and a learning rate), trained with seed s, is
right on question q where

    sqrt(r_q) A_q + sqrt(r_c) B_cq + t C_cs + sqrt(1 - r_q - r_c) E_csq > 0

with independent standard normals. A binary correlation rho between two configurations is a latent
r_q = sin(pi rho / 2); t = tau / phi(0) makes training alone move the accuracy by tau. Every
configuration is right half of the time: nothing is better than anything.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import ndtr

from loratune.analyse.crossed import crossed_difference, crossed_variance, not_too_certain
from loratune.planning.power import (
    DifferenceNoise,
    detectable_multiples,
    study_called_effect,
    study_detectable_effect,
)

FloatArray = npt.NDArray[np.float64]

NUM_TEST, NUM_HELD_OUT = 1319, 512
# tried by the method that is tuned much, and by the same method tuned little
NUM_MANY, NUM_FEW = 40, 5
CORRELATION, OWN_CORRELATION = 0.5, 0.65  # of two configurations', of two seeds' answers
SEED_SD = 0.005
NUM_CHOOSING = 3  # seeds of every configuration
_BATCH = 20

Procedure = Literal["test", "held-out", "fresh"]


@dataclass(frozen=True, slots=True)
class NullTest:
    """What became of `num_simulations` comparisons of a method with itself, in fractions.

    `bias` is the mean difference (tuned much - tuned little), `bias_error` its standard error.
    `ahead`: how often the much tuned one has the higher score; `level`: how often the two scores
    are equal, since a score counts questions. `rejected`: how often the two-sided 5% test says that
    they differ, `called`: how often `compare` would (the difference also reaches what it detects);
    None where the procedure makes no test.
    """

    num_simulations: int
    bias: float
    bias_error: float
    ahead: float
    level: float
    rejected: float | None
    called: float | None


def null_test(
    procedure: Procedure, *, num_simulations: int, seed: int, num_seeds: int = 5
) -> NullTest:
    """One method tuned over 40 configurations against itself over 5.

    "test": one seed each, the best of each on the 1,319 test questions, and their scores there.
    "held-out": chosen by the mean accuracy of `num_seeds` seeds on 512 held-out questions, scored
    on the test with those very seeds. "fresh": chosen so with 3 seeds, scored on the test with
    `num_seeds` others; what `compare` does with a sweep's confirmed choice.
    """
    draw = np.random.default_rng(seed)
    differences, rejected, called = list[FloatArray](), 0, 0
    for num in _batches(num_simulations):
        if procedure == "test":
            differences.append(_chosen_on_the_test(draw, num))
            continue
        tables = _chosen_on_held_out(draw, num, num_seeds=num_seeds, fresh=procedure == "fresh")
        differences.append(tables.mean(axis=(1, 2)))
        found = _tested(tables)
        rejected += int(found.rejected.sum())
        called += int(found.called.sum())
    all_of_them = np.concatenate(differences)
    tested = procedure != "test"
    return NullTest(
        num_simulations=num_simulations,
        bias=float(all_of_them.mean()),
        bias_error=float(all_of_them.std(ddof=1)) / math.sqrt(num_simulations),
        ahead=float((all_of_them > 0).mean()),
        level=float((all_of_them == 0).mean()),
        rejected=rejected / num_simulations if tested else None,
        called=called / num_simulations if tested else None,
    )


def _chosen_on_the_test(draw: np.random.Generator, num: int) -> FloatArray:
    """[num] differences of the two best test scores."""
    best = list[FloatArray]()
    shared = draw.standard_normal((num, 1, NUM_TEST), dtype=np.float32)
    for configurations in (NUM_MANY, NUM_FEW):
        own = draw.standard_normal((num, configurations, NUM_TEST), dtype=np.float32)
        right = math.sqrt(_latent(CORRELATION)) * shared + _rest(CORRELATION) * own > 0
        best.append(right.mean(axis=2).max(axis=1))
    return best[0] - best[1]


def _chosen_on_held_out(
    draw: np.random.Generator, num: int, *, num_seeds: int, fresh: bool
) -> FloatArray:
    """[num, S, Q] differences of the two chosen configurations' answers to the test."""
    choosing = NUM_CHOOSING if fresh else num_seeds
    shared_held_out = draw.standard_normal((num, 1, 1, NUM_HELD_OUT), dtype=np.float32)
    shared_test = draw.standard_normal((num, 1, NUM_TEST), dtype=np.float32)
    tables = list[FloatArray]()
    for configurations in (NUM_MANY, NUM_FEW):
        luck = draw.standard_normal((num, configurations, choosing, 1), dtype=np.float32)
        own = draw.standard_normal((num, configurations, 1, NUM_HELD_OUT), dtype=np.float32)
        answers = _answers(draw, shared_held_out, own, luck)
        chosen = answers.mean(axis=(2, 3)).argmax(axis=1)
        # Of the chosen one alone the test's answers matter; what it is on them is its own.
        if fresh:
            trained = draw.standard_normal((num, num_seeds, 1), dtype=np.float32)
        else:
            trained = luck[np.arange(num), chosen]
        own_test = draw.standard_normal((num, 1, NUM_TEST), dtype=np.float32)
        tables.append(_answers(draw, shared_test, own_test, trained).astype(np.float64))
    return tables[0] - tables[1]


def _answers(
    draw: np.random.Generator, shared: FloatArray, own: FloatArray, luck: FloatArray
) -> npt.NDArray[np.bool_]:
    shape = np.broadcast_shapes(shared.shape, own.shape, luck.shape)
    noise = draw.standard_normal(shape, dtype=np.float32)
    r_q, r_both = _latent(CORRELATION), _latent(OWN_CORRELATION)
    latent = math.sqrt(r_q) * shared + math.sqrt(r_both - r_q) * own
    return latent + SEED_SD / stats.norm.pdf(0) * luck + _rest(OWN_CORRELATION) * noise > 0


def _latent(correlation: float) -> float:
    """The normals' correlation at which their signs have this one."""
    return math.sin(math.pi * correlation / 2)


def _rest(correlation: float) -> float:
    return math.sqrt(1 - _latent(correlation))


@dataclass(frozen=True, slots=True)
class _Tested:
    rejected: npt.NDArray[np.bool_]
    called: npt.NDArray[np.bool_]


def _tested(tables: FloatArray) -> _Tested:
    """Whether `compare`'s test rejects 0, and whether the difference is called one, [n] each."""
    found = crossed_variance(tables)
    error, size = np.sqrt(found.variance), np.abs(found.value)
    critical = stats.t.ppf(0.975, found.df)
    if tables.shape[1] >= 10:
        zeros = np.zeros(tables.shape[1:])
        critical = np.array(
            [crossed_difference(table, zeros, paired=True).critical for table in tables]
        )
    rejected = size > critical * error
    return _Tested(rejected, rejected & (size >= detectable_multiples(found.df) * error))


def normal_tables(
    draw: np.random.Generator,
    num: int,
    *,
    num_seeds: int,
    num_questions: int,
    noise: DifferenceNoise,
    difference: float = 0.0,
) -> FloatArray:
    """[num, S, Q] paired differences with known components."""
    return (
        difference
        + math.sqrt(noise.seed_variance) * draw.standard_normal((num, num_seeds, 1))
        + math.sqrt(noise.question_variance) * draw.standard_normal((num, 1, num_questions))
        + math.sqrt(noise.residual_variance) * draw.standard_normal((num, num_seeds, num_questions))
    )


# The seeds' part of the variance over the questions' and residuals' part; the residual variance
# where the questions' is 1.
COVERAGE_CASES = {
    "questions dominate": (0.0, 0.1),
    "residuals dominate": (0.0, 30.0),
    "in between": (2.0, 0.5),
    "seeds above questions": (8.0, 0.5),
    "seeds dominate": (300.0, 0.1),
}


def coverage(
    case: str, *, num_seeds: int, num_questions: int, num_simulations: int, seed: int
) -> float:
    """How often the 95% interval of a difference covers the true one."""
    ratio, residual = COVERAGE_CASES[case]
    question_part = 1.0 / num_questions + residual / (num_seeds * num_questions)
    noise = DifferenceNoise(ratio * question_part * num_seeds, 1.0, residual, case)
    draw = np.random.default_rng(seed)
    missed = 0
    for num in _batches(num_simulations):
        tables = normal_tables(
            draw, num, num_seeds=num_seeds, num_questions=num_questions, noise=noise
        )
        missed += int(_tested(tables).rejected.sum())
    return 1.0 - missed / num_simulations


# Of a latent score: its mean, and the standard deviations of a method's own part of a question, of
# a seed, and of luck; questions themselves vary by 1, and an answer is right above 0.
ANSWER_CASES = {
    "questions dominate": (0.0, 1.0, 0.02, 0.3),
    "in between": (0.0, 0.5, 0.1, 0.7),
    "seeds dominate": (0.0, 0.1, 0.6, 0.1),
    "97% right, in between": (2.5, 0.5, 0.15, 0.5),
    "97% right, seeds dominate": (2.5, 0.1, 0.6, 0.3),
}
_BETTER = 0.2  # what the second method's latent score has more


def answer_coverage(
    case: str,
    *,
    paired: bool,
    num_seeds: int,
    num_questions: int,
    num_simulations: int,
    seed: int,
) -> float:
    """How often the 95% interval of the difference of two accuracies covers the true one.

    Right and wrong answers instead of normal tables, and two methods whose seeds are not shared as
    well (`paired` false).
    """
    mean, of_method, of_seed, luck = ANSWER_CASES[case]
    spread = math.sqrt(1.0 + of_method**2 + of_seed**2 + luck**2)
    true = float(ndtr((mean + _BETTER) / spread) - ndtr(mean / spread))
    draw = np.random.default_rng(seed)
    covered = 0
    for _ in range(num_simulations):
        question = draw.standard_normal(num_questions)
        # Seeds that are shared move both methods alike, by half of their variance.
        shared = draw.standard_normal((num_seeds, 1)) * (of_seed * math.sqrt(0.5) if paired else 0)
        own = of_seed * (math.sqrt(0.5) if paired else 1.0)
        first, second = (
            (
                mean
                + more
                + question
                + of_method * draw.standard_normal(num_questions)
                + shared
                + own * draw.standard_normal((num_seeds, 1))
                + luck * draw.standard_normal((num_seeds, num_questions))
                > 0
            ).astype(np.float64)
            for more in (_BETTER, 0.0)
        )
        found = not_too_certain(crossed_difference(first, second, paired=paired), first, second)
        covered += found.low <= true <= found.high
    return covered / num_simulations


@dataclass(frozen=True, slots=True)
class RealisedPower:
    """How often an effect that is said to be found (called) with 80% power was: fractions."""

    effect: float
    found: float
    called_effect: float
    called: float


def realised_power(
    noise: DifferenceNoise, *, num_seeds: int, num_questions: int, num_simulations: int, seed: int
) -> RealisedPower:
    """Simulates differences of just the detectable, and just the called effect."""
    effects = [
        effect(noise, num_seeds=num_seeds, num_questions=num_questions)
        for effect in (study_detectable_effect, study_called_effect)
    ]
    detectable, called = (one for one in effects if one is not None)
    draw = np.random.default_rng(seed)
    counts = [0, 0]
    for num in _batches(num_simulations):
        for index, difference in enumerate((detectable, called)):
            tables = normal_tables(
                draw,
                num,
                num_seeds=num_seeds,
                num_questions=num_questions,
                noise=noise,
                difference=difference,
            )
            tested = _tested(tables)
            counts[index] += int((tested.called if index else tested.rejected).sum())
    return RealisedPower(
        detectable, counts[0] / num_simulations, called, counts[1] / num_simulations
    )


def _batches(num: int) -> Iterator[int]:
    for start in range(0, num, _BATCH):
        yield min(_BATCH, num - start)

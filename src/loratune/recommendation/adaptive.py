"""An adaptive search of batch size and learning rate: what to train next, and when to stop.

A Gaussian process (scikit-learn's; an anisotropic Matern kernel and white noise) models a method's
validation loss over (log2 batch size, ln LR). Each round proposes a pack of trials: points at which
posterior samples of the surface have their best, weighted by how much better it is there than at
the present answer, each taken into account before the next is chosen (its posterior variance does
not depend on what will be measured), and further seeds of the answer where its own noise decides.
This goes on until the expected regret of the answer, E[loss at the answer - least loss], over joint
posterior samples, is below a margin, or the budget is spent, which is said.

The idea: Thompson sampling with top-two weighting (Russo 2016, arXiv 1602.08448), and pending
points as in batch Bayesian optimisation (Ginsbourger et al. 2010, kriging believer).

What is modelled is z = tau log(1 + log(loss / best) / tau) with tau = 0.1: near the best it is the
relative excess over it, far off the walls are pressed down, so that one length scale fits both.

Divergence is data. At one batch size all LRs at or above one that diverged are taken to diverge
too, all at or below one that trained are safe, and between them a logistic regression over all
batch sizes says how likely it is. Only a point that was trained, and where no seed diverged, can be
the answer; near a divergence its chance to diverge with another seed counts against it.

Not covered: noise of the validation rows; uncertainty of the kernel's parameters (they are the most
likely ones), so that the expected regret is too low at times: docs/decisions.md measures how often.
Pure: a function of the observations, whatever their order.
"""

# scikit-learn and scipy come without complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.linear_model import LogisticRegression

from loratune.planning.search_space import SearchPoint, Space

Floats = NDArray[np.float64]

# Relative excess over the best loss up to which z is that excess.
TAU = 0.1
NUM_SAMPLES = 1000
# Of the logistic regression of divergence: a weak prior.
LOGISTIC_C = 100.0
# Trials that the regression's word counts for at a point.
PRIOR_WEIGHT = 2.0
# What a diverged trial costs, as a relative excess of the loss (assumption).
COST_OF_DIVERGENCE = 1.0
# Rougher than the usual 2.5, so that the process is less sure of what it has not seen.
NU = 1.5
# Four doublings of the batch size and a factor of 4.5 in LR are one unit of length.
UNIT = np.array([4.0, 1.5])
# Of the answer, before the search may end: one seed alone may be lucky.
LEAST_SEEDS = 2
SURE = 0.9
# Standard deviation of a trial's relative loss: the most that the process may take for noise, and
# the least.
MOST_NOISE = 5e-2
LEAST_NOISE = 5e-4
# Standard deviation of the log of the loss that is expected of a trial that was stopped half-way,
# as measured on recorded curves (0.10 to 0.17 on SmolLM2-135M; docs/adaptive-search.md).
SPREAD_OF_STOPPED = 0.15
# Of LRs that count as beside the answer's.
NEAR = 2.0
DEFAULT_MARGIN = 0.005
TRIALS_PER_ROUND = 6


@dataclass(frozen=True, slots=True)
class Observed:
    """A trial that was trained. `loss` is None where it diverged.

    A trial without an answer (failed) is `useless`: its point is left alone. The loss of one that
    was `stopped` is what it was going to reach, roughly: it shapes the surface, but the trial is no
    candidate.
    """

    batch_size: int
    learning_rate: float
    seed: int
    loss: float | None
    useless: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class Surface:
    """The posterior over a space's points, and what is known of divergence.

    `mean` [points] and `covariance` [points, points] are of z, `reference` is the loss at z = 0,
    `noise` the variance of one trial's z, `diverges` [points] the probability that a trial does.
    `num_seeds` [points] counts trials that trained to their end; `safe` [points]: those that can be
    the answer, trained, and no seed diverged or was stopped.
    `left` [points]: seeds that can still be tried.
    """

    space: Space
    mean: Floats
    covariance: Floats
    reference: float
    noise: float
    diverges: Floats
    risk: Floats
    num_seeds: NDArray[np.int64]
    safe: NDArray[np.bool_]
    left: tuple[tuple[int, ...], ...]

    @property
    def noise_is_bounded(self) -> bool:
        """Whether the noise is the most that is allowed, so that seeds may differ by more."""
        return self.noise >= 0.99 * MOST_NOISE**2

    def excess(self, z: Floats) -> Floats:
        """The relative excess over `reference` that is meant by z."""
        return np.exp(TAU * np.expm1(np.clip(z / TAU, -50.0, 4.0))) - 1


def fit_surface(observations: Sequence[Observed], space: Space) -> Surface | None:
    """The posterior given the observations; None where fewer than three trials have a loss."""
    known = sorted(observations, key=lambda one: (one.batch_size, one.learning_rate, one.seed))
    with_loss = [one for one in known if one.loss is not None and not one.useless]
    if len(with_loss) < 3:
        return None
    at = np.array([space.index[one.batch_size, one.learning_rate] for one in with_loss])
    logs = np.log([float(one.loss) for one in with_loss if one.loss is not None])
    reference = float(logs.min())
    z = TAU * np.log1p((logs - reference) / TAU)
    centre, spread = float(np.median(z)), max(float(z.std()), 1e-3)
    x = space.coordinates / UNIT
    # How far a loss expected half-way is off, in z.
    off = SPREAD_OF_STOPPED / (1 + (logs - reference) / TAU)
    off *= np.array([one.stopped for one in with_loss])
    own = (_own_variance(at, z) + off**2) / spread**2
    process = _fitted_process(x[at], (z - centre) / spread, own, spread=spread)
    noise = float(process.kernel_.k2.noise_level)
    mean, covariance = process.predict(x, return_cov=True)
    # scikit-learn's covariance is that of a new trial at each point: take its noise out.
    covariance = np.asarray(covariance) - noise * np.eye(len(x))
    diverges, risk = _divergence(known, space)
    return Surface(
        space=space,
        mean=centre + spread * np.asarray(mean),
        covariance=spread**2 * covariance,
        reference=math.exp(reference),
        noise=spread**2 * noise,
        diverges=diverges,
        risk=risk,
        num_seeds=np.bincount(
            [index for index, one in zip(at, with_loss, strict=True) if not one.stopped],
            minlength=len(x),
        ),
        safe=_safe(known, space),
        left=_left(known, space),
    )


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """What the surface says. Regrets are fractions of the loss.

    `expected_loss` is the posterior mean at the answer, `loss_low` and `loss_high` its central 95%.
    `acceptable_batch_sizes`: at the LR that is best there, within `margin` of the best with
    95% posterior probability; `possible_batch_sizes`: those that hold the best in 5% of samples
    or more.
    """

    batch_size: int
    learning_rate: float
    num_seeds: int
    expected_loss: float
    loss_low: float
    loss_high: float
    expected_regret: float
    chance_within_margin: float
    acceptable_batch_sizes: tuple[int, ...]
    possible_batch_sizes: tuple[int, ...]
    rates: tuple[tuple[int, float], ...]


def search_answer(surface: Surface, *, margin: float) -> SearchAnswer | None:
    """The best of the safe points by the posterior mean; None where none is safe."""
    if not surface.safe.any():
        return None
    chosen = _chosen(surface)
    samples, possible = _samples(surface, surface.covariance)
    excess = surface.excess(samples) + surface.risk
    best = np.where(possible, excess, np.inf).min(axis=1)
    regret = np.maximum((1 + excess) / (1 + best)[:, None] - 1, 0.0)
    sizes = surface.space.coordinates[:, 0]
    holder = np.where(possible, excess, np.inf).argmin(axis=1)
    acceptable, possible_sizes = list[int](), list[int]()
    rates = list[tuple[int, float]]()
    for size in surface.space.batch_sizes:
        here = sizes == math.log2(size)
        if float(here[holder].mean()) >= 0.05:
            possible_sizes.append(size)
        if not (here & surface.safe).any():
            continue
        # The best LR of a batch size need not have been tried there, only one above it.
        index = _least(
            surface.excess(surface.mean) + surface.risk, here & _below_a_safe_one(surface)
        )
        rates.append((size, surface.space.points[index][1]))
        if float((regret[:, index] <= margin).mean()) >= 0.95:
            acceptable.append(size)
    size, rate = surface.space.points[chosen]
    at = surface.reference * (1 + excess[:, chosen])
    return SearchAnswer(
        batch_size=size,
        learning_rate=rate,
        num_seeds=int(surface.num_seeds[chosen]),
        expected_loss=surface.reference * float(1 + surface.excess(surface.mean)[chosen]),
        loss_low=float(np.quantile(at, 0.025)),
        loss_high=float(np.quantile(at, 0.975)),
        expected_regret=float(regret[:, chosen].mean()),
        chance_within_margin=float((regret[:, chosen] <= margin).mean()),
        acceptable_batch_sizes=tuple(acceptable),
        possible_batch_sizes=tuple(possible_sizes),
        rates=tuple(rates),
    )


def next_points(
    observations: Sequence[Observed],
    space: Space,
    *,
    margin: float,
    max_trials: int,
    trials_per_round: int,
) -> tuple[SearchPoint, ...]:
    """What the search trains next; nothing once it is decided, or `max_trials` are spent.

    Args:
        observations: every trial so far, the first design's among them.
        space: what may be tried.
        margin: expected regret, as a fraction of the loss, below which the answer is good enough.
        max_trials: of one curve, failed ones included.
        trials_per_round: how many are proposed at once.
    """
    room = min(trials_per_round, max_trials - len(observations))
    if room <= 0:
        return ()
    surface = fit_surface(observations, space)
    answer = None if surface is None else search_answer(surface, margin=margin)
    if surface is not None and answer is not None and is_close(answer, margin=margin):
        # Where a point may have one seed alone, no further trial makes its answer a decided one.
        allowed = len(space.seeds[space.index[answer.batch_size, answer.learning_rate]])
        if answer.num_seeds >= min(LEAST_SEEDS, allowed):
            return untried_neighbours(surface, answer)[:room]
    return propose(surface, space, observations, num_trials=room)


def is_close(answer: SearchAnswer, *, margin: float) -> bool:
    """Whether the expected regret is below the margin, and the regret is so with 90% probability.

    That is as the surface has it; `is_decided` also asks what the surface may be wrong about.
    """
    return answer.expected_regret < margin and answer.chance_within_margin >= SURE


def is_decided(surface: Surface, answer: SearchAnswer, *, margin: float) -> bool:
    """Whether the answer is close to the best, has two seeds, and its neighbours were tried.

    One seed alone may be lucky.
    """
    return (
        is_close(answer, margin=margin)
        and answer.num_seeds >= LEAST_SEEDS
        and not untried_neighbours(surface, answer)
    )


def untried_neighbours(surface: Surface, answer: SearchAnswer) -> tuple[SearchPoint, ...]:
    """The points beside the answer that must be trained before its surface is believed.

    A surface that is smoother than the truth is sure of what it has not seen (a kink, a cliff). So
    a lower and a higher LR within a factor of NEAR at the answer's batch size, and both batch sizes
    beside it at an LR within that factor, have to be among the trials, unless they would diverge.
    """
    space, (size, rate) = surface.space, (answer.batch_size, answer.learning_rate)
    sizes = space.batch_sizes
    at = sizes.index(size)
    tried = (surface.num_seeds > 0) | (surface.diverges == 1.0)
    wanted = list[SearchPoint]()
    for other, low, high in (
        (size, 1 / NEAR, 1.0),
        (size, 1.0, NEAR),
        *((one, 1 / NEAR, NEAR) for one in (*sizes[max(0, at - 1) : at], *sizes[at + 1 : at + 2])),
    ):
        near = [
            index
            for index, (one_size, one_rate) in enumerate(space.points)
            if one_size == other
            and low <= one_rate / rate <= high
            and (one_size, one_rate) != (size, rate)
        ]
        free = [index for index in near if surface.left[index]]
        if not near or any(tried[index] for index in near) or not free:
            continue
        # The middle of the stretch: on the answer's own side as far as the factor allows it.
        middle = rate * math.sqrt(low * high)
        index = min(free, key=lambda one: abs(math.log(space.points[one][1] / middle)))
        wanted.append(space.at(index, surface.left[index][0]))
    return tuple(wanted)


def propose(
    surface: Surface | None, space: Space, observations: Sequence[Observed], *, num_trials: int
) -> tuple[SearchPoint, ...]:
    """The next pack of trials, at most `num_trials`; fewer where nothing is left to learn.

    Without a surface (nearly everything diverged) it is lower LRs, or more of the first design.
    """
    if surface is None:
        return _without_surface(space, observations, num_trials=num_trials)
    covariance = surface.covariance
    left = [list(seeds) for seeds in surface.left]
    taken = surface.num_seeds.astype(np.float64)
    picks = list[SearchPoint]()
    for pick in range(num_trials):
        open_ = np.array([bool(seeds) for seeds in left]) & (surface.diverges < 0.9)
        if not open_.any():
            break
        index = _next(surface, covariance, open_, taken, pick=pick)
        picks.append(space.at(index, left[index].pop(0)))
        taken[index] += 1
        column = covariance[:, index]
        covariance = covariance - np.outer(column, column) / (column[index] + surface.noise)
    return tuple(picks)


def _next(
    surface: Surface, covariance: Floats, open_: NDArray[np.bool_], taken: Floats, *, pick: int
) -> int:
    """Where samples beat the answer most; the answer itself where less is known of it."""
    samples, possible = _samples(surface, covariance, pick=pick)
    excess = surface.excess(samples) + surface.risk
    gain = np.zeros(len(surface.mean))
    chosen = _chosen(surface) if surface.safe.any() else None
    holder = np.where(possible & open_, excess, np.inf).argmin(axis=1)
    rows = np.arange(len(samples))
    if chosen is None:
        np.add.at(gain, holder, 1.0)
        return int(gain.argmax())
    np.add.at(gain, holder, np.maximum(excess[:, chosen] - excess[rows, holder], 0.0))
    if not gain.any():
        gain[chosen] = 1.0
    rival = int(np.where(open_, gain, -1.0).argmax())
    fewer = taken[chosen] < LEAST_SEEDS and float(gain.sum()) / len(samples) < 0.01
    less_known = covariance[chosen, chosen] > covariance[rival, rival]
    return chosen if open_[chosen] and (fewer or less_known) else rival


def _samples(
    surface: Surface, covariance: Floats, *, pick: int = 0
) -> tuple[Floats, NDArray[np.bool_]]:
    """[samples, points] of z, and whether a trial would live there, by one draw for all points."""
    rng = np.random.default_rng([int(surface.num_seeds.sum()), pick])
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    samples = surface.mean + rng.standard_normal((NUM_SAMPLES, len(values))) @ root.T
    return samples, surface.diverges < rng.uniform(0.0, 1.0, (NUM_SAMPLES, 1))


def _chosen(surface: Surface) -> int:
    return _least(surface.excess(surface.mean) + surface.risk, surface.safe)


def _least(values: Floats, among: NDArray[np.bool_]) -> int:
    return int(np.where(among, values, np.inf).argmin())


def _below_a_safe_one(surface: Surface) -> NDArray[np.bool_]:
    return surface.diverges == 0.0


def _own_variance(at: NDArray[np.int64], z: Floats) -> Floats:
    """[trials]: the variance of the trials at the same point, 0 where there is one alone.

    Noise is not the same everywhere: far above the best LR one seed may blow up and the next train.
    Without this such a pair would pass for noise at the best point, too.
    """
    variance = np.zeros(len(z))
    for index in np.unique(at):
        here = at == index
        if here.sum() > 1:
            variance[here] = z[here].var(ddof=1)
    return variance


def _fitted_process(x: Floats, y: Floats, own_variance: Floats, *, spread: float) -> Any:
    """The most likely kernel from one start; bounds keep length scales and noise plausible."""
    noise = [(bound / spread) ** 2 for bound in (LEAST_NOISE, 2e-3, MOST_NOISE)]
    kernel = ConstantKernel(2.0, (0.1, 100.0)) * cast("Any", Matern)([1.0, 1.0], (0.2, 10.0), nu=NU)
    kernel = kernel + WhiteKernel(noise[1], (noise[0], noise[2]))
    process = cast("Any", GaussianProcessRegressor)(kernel, alpha=own_variance + 1e-10)
    with warnings.catch_warnings():
        # A parameter at its bound is no trouble here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(x, y)
    return process


def _lowest_diverged(observations: Sequence[Observed]) -> dict[int, float]:
    lowest = dict[int, float]()
    for one in observations:
        if one.loss is None and not one.useless:
            rate = min(one.learning_rate, lowest.get(one.batch_size, math.inf))
            lowest[one.batch_size] = rate
    return lowest


def _lived(observations: Sequence[Observed], space: Space) -> NDArray[np.bool_]:
    """[points]: trained with a loss, and no seed diverged there or at a lower LR."""
    lowest = _lowest_diverged(observations)
    lived = np.zeros(len(space.points), dtype=np.bool_)
    for one in observations:
        bound = lowest.get(one.batch_size, math.inf)
        if one.loss is not None and not one.useless and one.learning_rate < bound:
            lived[space.index[one.batch_size, one.learning_rate]] = True
    return lived


def _safe(observations: Sequence[Observed], space: Space) -> NDArray[np.bool_]:
    """[points]: candidates for the answer, where moreover no seed was stopped."""
    safe = _lived(observations, space)
    for one in observations:
        if one.stopped:
            safe[space.index[one.batch_size, one.learning_rate]] = False
    return safe


def _left(observations: Sequence[Observed], space: Space) -> tuple[tuple[int, ...], ...]:
    """The seeds not tried at each point; none where a trial gave nothing."""
    tried = dict[tuple[int, float], set[int]]()
    closed = set[tuple[int, float]]()
    for one in observations:
        tried.setdefault((one.batch_size, one.learning_rate), set()).add(one.seed)
        if one.useless:
            closed.add((one.batch_size, one.learning_rate))
    return tuple(
        ()
        if point in closed
        else tuple(seed for seed in seeds if seed not in tried.get(point, set()))
        for point, seeds in zip(space.points, space.seeds, strict=True)
    )


def _divergence(observations: Sequence[Observed], space: Space) -> tuple[Floats, Floats]:
    """Two [points]: whether a trial diverges for the search, and what that costs an answer.

    The first is 0 up to the highest LR of a batch size that trained, 1 from the lowest that
    diverged on, and between them the logistic regression of all trials on log2 batch and ln LR. The
    second is over the stretch that trained: the regression as a Beta prior of weight 2, and each
    trial that lived there or at a higher LR counted as a success. Without any trial that diverged
    both are 0.
    """
    lowest = _lowest_diverged(observations)
    highest = dict[int, float]()
    for (size, rate), lived in zip(space.points, _lived(observations, space), strict=True):
        if lived:
            highest[size] = max(rate, highest.get(size, 0.0))
    between = np.zeros(len(space.points))
    counted = [one for one in observations if not one.useless]
    verdicts = np.array([one.loss is None for one in counted])
    if verdicts.all():
        between[:] = 0.5
    elif verdicts.any():
        x = np.array([[math.log2(one.batch_size), math.log(one.learning_rate)] for one in counted])
        model = LogisticRegression(C=LOGISTIC_C).fit(x / UNIT, verdicts)
        between = np.asarray(model.predict_proba(space.coordinates / UNIT))[:, 1]
    diverges, risk = np.zeros(len(space.points)), np.zeros(len(space.points))
    for index, (size, rate) in enumerate(space.points):
        if rate >= lowest.get(size, math.inf):
            diverges[index] = 1.0
        elif rate > highest.get(size, 0.0):
            diverges[index] = between[index]
        else:
            lived = sum(one.batch_size == size and one.learning_rate >= rate for one in counted)
            lived -= sum(one.batch_size == size and one.loss is None for one in counted)
            risk[index] = PRIOR_WEIGHT * between[index] / (PRIOR_WEIGHT + lived)
    return diverges, COST_OF_DIVERGENCE * risk


def _without_surface(
    space: Space, observations: Sequence[Observed], *, num_trials: int
) -> tuple[SearchPoint, ...]:
    """The lowest LRs that did not diverge yet, at the batch sizes in turn."""
    lowest = _lowest_diverged(observations)
    left = _left(observations, space)
    open_ = [
        index
        for index, (size, rate) in enumerate(space.points)
        if left[index] and rate < lowest.get(size, math.inf)
    ]
    open_.sort(key=lambda index: (space.points[index][1], space.points[index][0]))
    return tuple(space.at(index, left[index][0]) for index in open_[:num_trials])

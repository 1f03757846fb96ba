"""A simulated trainer: (batch size, LR, seed) -> validation loss, tokens, divergence, a curve.

Search and proxy rules are measured here because a true answer is known here. The surfaces start
from three that were fitted to recorded grids (`FITTED`: log validation loss of LoRA, PiSSA and
MiLoRA on SmolLM2-135M, 279 trials, docs/log/fig1-smollm2-results.csv; root mean square errors of
0.019, 0.027 and 0.014 in log loss), are moved at random, and then take a shape of a *family*, most
of which neither a Gaussian process nor a quadratic fits. Families marked held out in `FAMILIES`
are for the last measurement alone: nothing may be tuned on them.

With s = (log2 batch - 5) / 4 and x = ln(LR) - optimum(s),

    log loss = a0 + a1 s + a2 s^2 + exp(c0 + c1 s) (exp(r x) - r x - 1) / r^2     (fitted)
    optimum = v0 + v1 s + v2 s^2

which is mild below the best LR and steep above it, as the recorded grids are. Noise is relative:
a seed's own effect, shared by all trials of that seed (equal seeds give equal row order), and a
trial's. The recorded relative standard deviation is 0.1% below the best LR, 0.2% at three times it
and 2% at ten times it. A diverged trial leaves its model as it began, at `initial_loss`; `value` is
the expected loss with that counted in, `regret` its excess over the best (batch size, LR) there is.

What it does not model: noise of the validation rows, several epochs, memory, time.

Frozen before any rule was tuned on it. It may be changed to correct an error, said in the commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

# a0, a1, a2, v0, v1, v2, c0, c1, ln r of each method.
FITTED = {
    "lora": (-0.397, 0.149, 0.110, -5.899, -0.152, 0.031, -2.223, 0.844, 0.062),
    "pissa": (-0.378, 0.175, 0.130, -7.624, -0.164, -0.612, -2.453, 0.358, -0.303),
    "milora": (-0.388, 0.164, 0.130, -6.621, -0.133, -0.454, -2.355, 0.527, 0.009),
}


@dataclass(frozen=True)
class Family:
    """What a family's surfaces are like; `held_out`: for the last measurement alone."""

    name: str
    held_out: bool
    what: str


FAMILIES = (
    Family("fitted", False, "the recorded surfaces, moved"),
    Family("quadratic", False, "a quadratic in log batch and log LR"),
    Family("kink", False, "a V in log LR and in log batch: no curvature at the optimum"),
    Family("plateau", False, "flat within a factor of LR around the best, steep walls"),
    Family("cliff", False, "better up to an LR just above the best, where trials diverge"),
    Family("heavy_tail", False, "seed noise with the tails of Student's t, 2.5 degrees, bad luck"),
    Family("shifted", False, "the best LR rises by the root of the batch size, then falls"),
    Family("late_bloomer", False, "the best LR looks bad until the cosine has decayed"),
    Family("two_valleys", True, "a second, narrower valley at a higher LR, at times the better"),
    Family("ridge", True, "loss depends on LR / batch size nearly alone: a diagonal valley"),
    Family("kinked_cliff", True, "a V in log LR, a cliff close by, heavy tails"),
    Family("rough", True, "ripples of 0.5% that no seed averages away"),
    Family("step", True, "flat over batch up to a threshold, then a steep rise; late bloomers"),
)

NUM_PARTS = 20
LN_10 = float(np.log(10.0))


@dataclass(frozen=True)
class SimulatedTrial:
    """`loss` is None where it diverged; `curve` holds training losses of equal parts, to its end.

    `tokens` counts those trained, up to the divergence.
    """

    batch_size: int
    learning_rate: float
    seed: int
    loss: float | None
    tokens: float
    curve: tuple[float, ...]

    @property
    def diverged(self) -> bool:
        """Whether there is no final loss."""
        return self.loss is None


@dataclass(frozen=True)
class Problem:
    """One surface, its noise and its grid. `tokens` is what one whole trial trains on.

    `low` and `high` bound the LR; `grid` is seven LRs of that range. `cliff` is how far (in ln LR)
    above the best LR half of the trials diverge, moving by `cliff_slope` per unit of s. `noise` and
    `seed_noise` are relative, `tail` the degrees of freedom of Student's t, None for normal.
    `bad_luck` is the share of trials that come out up to 10% worse. `heat` is how much worse, in
    log loss, a trial at its best LR looks before the cosine decays.
    """

    family: str
    seed: int
    batch_sizes: tuple[int, ...]
    low: float
    high: float
    grid: tuple[float, ...]
    surface: tuple[float, ...]
    shape: tuple[float, ...] = ()
    cliff: float = 2.2
    cliff_slope: float = 0.0
    noise: float = 0.001
    seed_noise: float = 0.0005
    tail: float | None = None
    bad_luck: float = 0.0
    heat: float = 0.05
    initial_loss: float = 1.6
    tokens: float = 1e6
    scale: float = 1.0
    floor: float = 0.0

    @property
    def held_out(self) -> bool:
        """Whether the family is for the last measurement alone."""
        return next(one.held_out for one in FAMILIES if one.name == self.family)

    def optimum(self, batch_size: float) -> float:
        """ln of the LR about which the surface is built, at a batch size."""
        _, _, _, v0, v1, v2, *_ = self.surface
        s = _scaled(batch_size)
        if self.family == "shifted":
            # Li et al. 2024's surge: lr = 2 v0 / (sqrt(Bn / B) + sqrt(B / Bn)).
            ratio = np.sqrt(batch_size / self.shape[0])
            return v0 - float(np.log(0.5 * (ratio + 1 / ratio)))
        if self.family == "ridge":
            return v0 + self.shape[0] * 4 * float(np.log(2)) * s
        return v0 + v1 * s + v2 * s * s

    def expected(self, batch_size: float, learning_rate: float) -> float:
        """The mean loss of a trial that does not diverge."""
        a0, a1, a2, _, _, _, c0, c1, ln_r = self.surface
        s = _scaled(batch_size)
        x = float(np.log(learning_rate)) - self.optimum(batch_size)
        depth = a0 + a1 * s + a2 * s * s
        r, c = float(np.exp(ln_r)), float(np.exp(c0 + c1 * s))
        wall = c * float(np.exp(np.clip(r * x, -30, 6)) - r * x - 1) / r**2
        if self.family == "quadratic":
            wall = 0.5 * c * x * x
        elif self.family in ("kink", "kinked_cliff"):
            depth = a0 + self.shape[0] * abs(s - self.shape[1])
            wall = c * (0.8 * max(-x, 0.0) + 1.6 * max(x, 0.0))
        elif self.family == "plateau":
            beyond = max(abs(x) - self.shape[0], 0.0)
            wall = c * (beyond + beyond * beyond)
        elif self.family == "two_valleys":
            away, gap, width = self.shape
            second = gap + 3 * c * (1 - float(np.exp(-0.5 * ((x - away) / width) ** 2)))
            wall = min(wall, second)
        elif self.family == "ridge":
            depth = a0 + 0.15 * (a1 * s + a2 * s * s)
        elif self.family == "rough":
            one, two, three = self.shape
            wall += 0.005 * float(
                np.sin(5 * x + one) * np.sin(9 * s + two) + np.sin(11 * x + three)
            )
        elif self.family == "step":
            depth = a0 + self.shape[0] * float(1 / (1 + np.exp(-8 * (s - self.shape[1]))))
        return self.floor + self.scale * float(np.exp(min(depth + wall, 3.0)))

    def divergence(self, batch_size: float, learning_rate: float) -> float:
        """The probability that a trial diverges."""
        x = float(np.log(learning_rate)) - self.optimum(batch_size)
        at = self.cliff + self.cliff_slope * _scaled(batch_size)
        return float(1 / (1 + np.exp(np.clip(-10 * (x - at), -50, 50))))

    def value(self, batch_size: float, learning_rate: float) -> float:
        """The mean loss with what diverges counted in, at `initial_loss`."""
        p, loss = (
            self.divergence(batch_size, learning_rate),
            self.expected(batch_size, learning_rate),
        )
        worst = self.floor + self.scale * self.initial_loss
        return loss + p * max(worst - loss, 0.0)

    def best(self) -> tuple[float, int, float]:
        """(value, batch size, LR) of the best point between the bounds (LR to 0.5%)."""
        return _best(self)

    def regret(self, batch_size: int, learning_rate: float) -> float:
        """How much worse than the best there is, as a fraction of the best's loss."""
        return self.value(batch_size, learning_rate) / self.best()[0] - 1

    def trial(self, batch_size: int, learning_rate: float, seed: int) -> SimulatedTrial:
        """One trial; the same arguments give the same one."""
        rate = float(learning_rate)
        of_seed = np.random.default_rng([self.seed, 1, seed])
        own = np.random.default_rng(
            [self.seed, 2, batch_size, round(1e6 * (float(np.log(rate)) + 50)), seed]
        )
        expected = self.expected(batch_size, rate)
        x = float(np.log(rate)) - self.optimum(batch_size)
        # Twice the noise at three times the best LR and 20 times at ten times it, as recorded.
        spread = self.noise * float(np.exp(np.clip(0.6 * x + 0.3 * max(x, 0.0) ** 2, -0.3, 3.0)))
        draw = own.standard_t(self.tail) if self.tail is not None else own.standard_normal()
        unlucky = float(own.uniform(0.0, 0.1)) if own.random() < self.bad_luck else 0.0
        luck = self.seed_noise * float(of_seed.standard_normal()) + spread * float(draw) + unlucky
        final = expected * float(np.exp(np.clip(luck, -0.5, 1.0)))
        blocks = 0.03 * of_seed.standard_normal(NUM_PARTS)
        curve = self._curve(final, x, blocks, 0.005 * own.standard_normal(NUM_PARTS), batch_size)
        diverged = own.random() < self.divergence(batch_size, rate)
        if not diverged:
            return SimulatedTrial(batch_size, rate, seed, final, self.tokens, tuple(curve.tolist()))
        at = int(own.integers(1, NUM_PARTS))
        return SimulatedTrial(
            batch_size, rate, seed, None, self.tokens * at / NUM_PARTS, tuple(curve[:at].tolist())
        )

    def _curve(
        self,
        final: float,
        x: float,
        blocks: np.ndarray,
        own: np.ndarray,
        batch_size: int,
    ) -> np.ndarray:
        """Training losses of NUM_PARTS parts, ending near the final validation loss (over 1.05).

        Progress is a stretched exponential, slower at lower LR and larger batches; above it lies
        the heat of the LR, which goes with the square of the cosine's factor and grows with the LR.
        """
        part = (np.arange(NUM_PARTS) + 0.5) / NUM_PARTS
        pace = 12.0 * float(np.exp(np.clip(0.4 * x - 0.6 * _scaled(batch_size), -3, 2)))
        slow = np.exp(-np.sqrt(pace * part))
        slow = (slow - slow[-1]) / (1 - slow[-1])
        start = self.floor + self.scale * self.initial_loss
        end = final / 1.05
        base = end + max(start - end, 0.05 * end) * slow
        heat = self.heat * float(np.exp(np.clip(0.8 * x, -3, 2.5)))
        factor = 0.5 * (1 + np.cos(np.pi * part))
        noise = blocks + own * float(np.exp(np.clip(x, -0.5, 2)))
        return base * np.exp(heat * factor**2 + noise)


@dataclass(frozen=True)
class Pair:
    """A proxy and its target: a trial of the target costs `cost_ratio` times the proxy's.

    The target's optimum is shifted by `shift_batch` (log2) and `shift_lr` (ln).
    """

    proxy: Problem
    target: Problem
    cost_ratio: float
    shift_batch: float
    shift_lr: float


def make_problem(family: str, seed: int) -> Problem:
    """The problem of a family with this seed.

    Raises:
        ValueError: no such family.
    """
    names = [one.name for one in FAMILIES]
    if family not in names:
        raise ValueError(f"family {family!r}; there are {', '.join(names)}")
    rng = np.random.default_rng([names.index(family), seed])
    surface = list(FITTED[str(rng.choice(list(FITTED)))])
    # The best batch size anywhere from 2 to 256: the depth is a parabola about `centre`.
    centre, bend = float(rng.uniform(-1.1, 0.9)), float(rng.uniform(0.06, 0.2))
    surface[0] += float(rng.normal(0.0, 0.15))
    surface[1], surface[2] = -2 * bend * centre, bend
    surface[0] += bend * centre**2
    surface[3] += float(rng.normal(0.0, 0.5))
    surface[4] += float(rng.normal(0.0, 0.25))
    surface[5] += float(rng.normal(0.0, 0.15))
    surface[6] += float(rng.normal(0.0, 0.3))
    surface[7] += float(rng.normal(0.0, 0.2))
    middle = surface[3] + float(rng.uniform(-0.7, 0.7))
    # Seven LRs in steps of 10^(1/2): three decades, as studies of LoRA variants scan.
    lowest = middle - 1.5 * LN_10
    grid = tuple(float(f"{np.exp(lowest + 0.5 * LN_10 * index):.3g}") for index in range(7))
    largest = int(rng.integers(8, 11))
    problem = Problem(
        family=family,
        seed=int(rng.integers(2**31)),
        batch_sizes=tuple(2**power for power in range(1, largest)),
        low=grid[0],
        high=grid[-1],
        grid=grid,
        surface=tuple(surface),
        cliff=float(rng.uniform(1.8, 3.0)),
        cliff_slope=float(rng.normal(0.0, 0.3)),
        noise=float(rng.uniform(0.0006, 0.002)),
        seed_noise=float(rng.uniform(0.0002, 0.001)),
        heat=float(rng.uniform(0.02, 0.1)),
    )
    return _shaped(problem, rng)


def _shaped(problem: Problem, rng: np.random.Generator) -> Problem:
    """The problem with what its family needs."""
    family = problem.family
    if family in ("kink", "kinked_cliff"):
        shape = (float(rng.uniform(0.08, 0.25)), float(rng.uniform(-0.9, 0.9)))
        problem = replace(problem, shape=shape)
    if family == "plateau":
        problem = replace(problem, shape=(float(rng.uniform(0.5, 1.2)),))
    if family in ("cliff", "kinked_cliff"):
        problem = replace(problem, cliff=float(rng.uniform(0.15, 0.7)))
    if family == "cliff":
        # Better and better up to the cliff: the wall above the best LR is beyond it.
        lower = (*problem.surface[:8], problem.surface[8] - 0.5)
        problem = replace(problem, surface=lower)
    if family in ("heavy_tail", "kinked_cliff"):
        problem = replace(problem, tail=2.5, bad_luck=0.05, noise=1.5 * problem.noise)
    if family == "shifted":
        problem = replace(problem, shape=(float(2 ** rng.uniform(3, 8)),))
    if family in ("late_bloomer", "step"):
        problem = replace(problem, heat=float(rng.uniform(0.2, 0.5)))
    if family == "two_valleys":
        shape = (
            float(rng.uniform(1.2, 1.8)),
            float(rng.choice([-0.03, 0.03])),
            float(rng.uniform(0.2, 0.4)),
        )
        problem = replace(problem, shape=shape, cliff=3.0)
    if family == "ridge":
        problem = replace(problem, shape=(float(rng.uniform(0.5, 1.0)),))
    if family == "rough":
        problem = replace(problem, shape=tuple(rng.uniform(0, 2 * np.pi, 3).tolist()))
    if family == "step":
        problem = replace(
            problem, shape=(float(rng.uniform(0.2, 0.6)), float(rng.uniform(-0.5, 0.6)))
        )
    return problem


def make_problems(
    num_per_family: int, *, held_out: bool | None = None, first_seed: int = 0
) -> tuple[Problem, ...]:
    """So many problems of every family; of the held-out ones alone, or of the others, if asked."""
    return tuple(
        make_problem(family.name, first_seed + index)
        for family in FAMILIES
        if held_out is None or family.held_out == held_out
        for index in range(num_per_family)
    )


def make_pair(family: str, seed: int, *, cost_ratio: float = 16.0, far: bool = False) -> Pair:
    """A target of the family and its proxy; `far`: shifts three times as large, to be held out.

    The shifts of the optimum are normal with 0.35 (log2 batch) and 0.3 (ln LR), the target's loss
    is scaled by 0.6 to 0.95 over a floor, and its walls are up to 1.5 times as steep or as mild.
    """
    proxy = make_problem(family, seed)
    rng = np.random.default_rng([len(FAMILIES), seed, int(far)])
    factor = 3.0 if far else 1.0
    shift_batch = factor * float(rng.normal(0.0, 0.35))
    shift_lr = factor * float(rng.normal(0.0, 0.3))
    surface = list(proxy.surface)
    shift_s = shift_batch / 4
    a0, a1, a2 = surface[:3]
    # depth(s) becomes depth(s - shift), and the optimum v(s) becomes v(s) + shift.
    surface[0] = a0 - a1 * shift_s + a2 * shift_s**2
    surface[1] = a1 - 2 * a2 * shift_s
    surface[3] += shift_lr
    surface[6] += float(rng.uniform(-0.4, 0.4))
    shape = proxy.shape
    if family in ("kink", "kinked_cliff", "step"):
        shape = (shape[0], shape[1] + shift_s)
    if family == "shifted":
        shape = (shape[0] * 2**shift_batch,)
    target = replace(
        proxy,
        seed=int(rng.integers(2**31)),
        surface=tuple(surface),
        shape=shape,
        scale=float(rng.uniform(0.6, 0.95)),
        floor=float(rng.uniform(0.0, 0.1)),
        cliff=proxy.cliff + float(rng.normal(0.0, 0.15)),
    )
    return Pair(proxy, target, cost_ratio, shift_batch, shift_lr)


def full_grid(problem: Problem, seeds: Sequence[int]) -> tuple[SimulatedTrial, ...]:
    """Every trial of the problem's own grid, whose LRs are coarser than those of `rules.SWEEP`."""
    return tuple(
        problem.trial(size, rate, seed)
        for size in problem.batch_sizes
        for rate in problem.grid
        for seed in seeds
    )


def grid_choice(trials: Sequence[SimulatedTrial]) -> tuple[int, float] | None:
    """(batch size, LR) of the best mean over seeds, where none diverged; None if all did."""
    by_point = dict[tuple[int, float], list[float | None]]()
    for one in trials:
        by_point.setdefault((one.batch_size, one.learning_rate), []).append(one.loss)
    means = {
        point: sum(loss for loss in losses if loss is not None) / len(losses)
        for point, losses in by_point.items()
        if None not in losses
    }
    return min(means, key=lambda point: means[point]) if means else None


@cache
def _best(problem: Problem) -> tuple[float, int, float]:
    rates = np.exp(np.arange(np.log(problem.low), np.log(problem.high) + 1e-9, 0.005))
    return min(
        (problem.value(size, rate), size, float(rate))
        for size in problem.batch_sizes
        for rate in rates
    )


def _scaled(batch_size: float) -> float:
    return (float(np.log2(batch_size)) - 5) / 4

"""Rules that choose a batch size and LR, side by side: regret against cost, on pairs of models.

A pair is a proxy and a target, simulated (`simulator.py`) or recorded (`ladder.py`). The rule of
`loratune tune` runs by its own code: the studies of `new_study`, what `recommendation.rounds` adds
to them, the search and the answer of `recommendation.proxy`; only the training is replaced.

Every rule has the same LR budget on the target: three LRs, up to six more beyond an end where
the best one is at an end, and one between. Rules without a proxy start from one LR for all
(`START`, the mean of the recorded optima) in steps of 2, those with one from what they expect in
steps of 1.5. Cost is trained tokens, the target's times the ratio of FLOPs, over those of the fixed
sweep (`sweep_of`, whole trials of the target). Regret is the excess of the expected loss over the
best there is between the bounds, as a fraction; beside it, choice and that sweep's choice are
compared on fresh seeds. A model that lacks some of the batch sizes is swept and searched at those
it has; all of them are paid for, on both sides of the fraction. Same seed, same numbers.

Not here: the noise scale alone, since the simulator knows no gradients, nor any time. `ladder.py`
has both for real models.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Protocol

import numpy as np

from loratune.analyse.cells import Cell, make_cells
from loratune.analyse.intervals import t_quantile
from loratune.analyse.laws.between import rate_between
from loratune.analyse.laws.loss import LossPoint, fit_loss, fit_optimum
from loratune.analyse.proportions import wilson
from loratune.errors import AnalysisError
from loratune.new_study import (
    HELD_OUT_SHARE,
    MOST_HELD_OUT,
    Request,
    finest_grid,
    fixed_sweep,
    proxy_studies,
    target_study,
)
from loratune.planning.shapes import declared_model_facts
from loratune.planning.trials import plan_trials
from loratune.recommendation.proxy import (
    ModelOfPair,
    ProxyPair,
    expected_rate,
    proxy_answer,
    recommend_by_proxy,
    search_rate,
    search_target,
)
from loratune.recommendation.rounds import refinement
from loratune.records import DataFacts, Outcome, Trial, TrialResult
from loratune.study.schema import DeclaredModel, Study
from simulator import FAMILIES, FITTED, Pair, Problem, grid_choice, make_pair

START = float(np.exp(np.mean([surface[3] for surface in FITTED.values()])))
TOLERATED = 0.005
MOST_COST = 0.05
NUM_FRESH, FIRST_FRESH = 20, 1000
# The best batch size goes with data to this power: Power Lines and Step Law (FACTS: 0.383, 0.571).
DATA_EXPONENTS = (0.383, 0.571)
NUM_ROWS = 8192
UNINFORMED_STEP = 2.0


class Trained(Protocol):
    """One trial's end: no loss where it diverged; `tokens` are those it was trained on."""

    @property
    def loss(self) -> float | None: ...
    @property
    def tokens(self) -> float: ...


class Trainer(Protocol):
    """A model that can be trained at a batch size and LR; `tokens` are a whole trial's."""

    @property
    def batch_sizes(self) -> tuple[int, ...]: ...
    @property
    def tokens(self) -> float: ...
    def trial(self, batch_size: int, learning_rate: float, seed: int) -> Trained: ...


@dataclass(frozen=True)
class Choice:
    """What a rule chose, and what it had cost as a part of the fixed sweep."""

    batch_size: int
    learning_rate: float
    cost: float


class Lab:
    """Trains the studies of one model and counts every trial once."""

    def __init__(self, model: Trainer, *, name: str, num_rows: int) -> None:
        self.model = model
        self.name = name
        self.num_rows = num_rows
        self.results = dict[tuple[int, float, int], TrialResult]()

    def run(self, study: Study) -> list[TrialResult]:
        """All results of the study, with what its outcomes call for; see `settling`."""
        found = list[TrialResult]()
        for size in study.batch_size:
            if size not in self.model.batch_sizes:
                continue
            points = [(rate, seed) for rate in study.learning_rates() for seed in study.seeds.grid]
            of_cell = list[TrialResult]()
            while points:
                of_cell += [self._train(size, rate, seed) for rate, seed in points]
                (cell,) = make_cells(of_cell)
                points = refinement(cell, rates=study.learning_rate, seeds=study.seeds)
            found += of_cell
        return found

    @property
    def tokens(self) -> float:
        """Tokens of all trials so far."""
        return math.fsum(one.outcome.num_tokens for one in self.results.values() if one.outcome)

    def _train(self, size: int, rate: float, seed: int) -> TrialResult:
        key = (size, rate, seed)
        if key not in self.results:
            end = self.model.trial(*key)
            self.results[key] = _result(self.name, *key, end, num_rows=self.num_rows)
        return self.results[key]


Rule = Callable[["Bench"], Choice | None]


class Bench:
    """One pair of models and so many rows to train on, and what several rules ask of it."""

    def __init__(
        self,
        proxy: Trainer,
        target: Trainer,
        *,
        cost_ratio: float,
        num_rows: int = NUM_ROWS,
        start: float = START,
        less_data: Trainer | None = None,
        widths: tuple[int, int] = (1, 1),
        model_type: str | None = None,
    ) -> None:
        self.proxy, self.target, self.less_data = proxy, target, less_data
        self.num_rows = num_rows
        self.start = start
        self.sweep_tokens = len(sweep_of(num_rows)) * target.tokens
        self.pair = ProxyPair(
            ModelOfPair("proxy", model_type, 1, widths[0], 8, 1.0),
            ModelOfPair("target", model_type, 2, widths[1], 8, cost_ratio),
            sweep_flops=cost_ratio * self.sweep_tokens,
            method="lora",
            folder="proxy",
        )
        self._searched = dict[str, tuple[list[TrialResult], float]]()

    def search(self, name: str) -> tuple[list[TrialResult], float]:
        """The shipped search on "proxy" or "less_data", and its FLOPs over the fixed sweep's."""
        if name not in self._searched:
            model = self.proxy if name == "proxy" else self.less_data
            assert model is not None
            lab = Lab(model, name="proxy", num_rows=self.num_rows)
            per_token = 1.0 / self.pair.sweep_flops
            studies = studies_of_proxy(self.num_rows)
            planned = _planned_trials(studies[0])
            study = studies[finest_grid(planned * model.tokens * per_token)]
            found = lab.run(study)
            # A simulated model lacks some batch sizes; a real one's search pays for all of them.
            there = sum(size in model.batch_sizes for size in study.batch_size)
            spent = lab.tokens * per_token * len(study.batch_size) / there
            self._searched[name] = found, spent
        return self._searched[name]

    def target_lab(self) -> Lab:
        """A new count of the target's trials."""
        return Lab(self.target, name="target", num_rows=self.num_rows)

    def at_target(
        self,
        batch_size: int,
        expected: float,
        *,
        step: float,
        lab: Lab | None = None,
    ) -> tuple[Lab, Cell | None]:
        """The LR budget that every rule has."""
        lab = lab or self.target_lab()
        return lab, search_rate(_train(lab), batch_size=batch_size, expected=expected, step=step)

    def cost(self, lab: Lab, searched: float = 0.0) -> float:
        """Of the target's trials and the search before them."""
        return lab.tokens / self.sweep_tokens + searched

    def size(self, wanted: float) -> int:
        """The target's batch size nearest to this one in doublings."""
        return min(self.target.batch_sizes, key=lambda one: abs(math.log2(one / wanted)))


def constant(wanted: int) -> Rule:
    """This batch size whatever the data, the LR searched."""

    def rule(bench: Bench) -> Choice | None:
        size = bench.size(wanted)
        lab, cell = bench.at_target(size, bench.start, step=UNINFORMED_STEP)
        return choice_of(cell, bench.cost(lab))

    return rule


def square_root(bench: Bench) -> Choice | None:
    """The LR searched at 16, and taken to batch size 128 by the square-root rule, untried."""
    small, large = bench.size(16), bench.size(128)
    lab, cell = bench.at_target(small, bench.start, step=UNINFORMED_STEP)
    if cell is None or cell.best is None:
        return None
    rate = cell.best.learning_rate * math.sqrt(large / small)
    return Choice(large, rate, bench.cost(lab))


def formula(bench: Bench) -> Choice | None:
    """A formula's LR, believed: searched in small steps about it, at batch size 128."""
    lab, cell = bench.at_target(bench.size(128), bench.start, step=1.5)
    return choice_of(cell, bench.cost(lab))


def tuned(bench: Bench) -> Choice | None:
    """`loratune tune` with a smaller model, as shipped."""
    return _tune(bench, "proxy")


def smaller_data(bench: Bench) -> Choice | None:
    """The same with the target itself on less data in the place of a smaller model."""
    return _tune(bench, "less_data")


def without_neighbours(bench: Bench) -> Choice | None:
    """`tune` without the two batch sizes beside the proxy's."""
    found, searched = bench.search("proxy")
    answer = proxy_answer(found, method="lora")
    if answer.batch_size is None:
        return None
    expected = expected_rate(found, answer, pair=bench.pair)
    lab, cell = bench.at_target(answer.batch_size, expected, step=1.5)
    return choice_of(cell, bench.cost(lab, searched))


def paper(bench: Bench) -> Choice | None:
    """The paper's recipe: the proxy's batch size; a third, once and three times its LR, 3 seeds."""
    found, searched = bench.search("proxy")
    answer = proxy_answer(found, method="lora")
    if answer.batch_size is None or answer.learning_rate is None:
        return None
    lab = bench.target_lab()
    expected = bench.pair.carried(answer.learning_rate)
    rates = [float(f"{expected * factor:.2g}") for factor in (1 / 3, 1, 3)]
    study = _target_study((answer.batch_size,), tuple(rates))
    seeds = study.seeds.model_copy(update={"around_best": 2})
    (cell,) = make_cells(lab.run(study.model_copy(update={"seeds": seeds})))
    return choice_of(cell, bench.cost(lab, searched))


def three_terms(bench: Bench) -> Choice | None:
    """The batch size of the three-term law, fitted to the proxy's losses at the best LRs."""
    found, searched = bench.search("proxy")
    cells = [cell for cell in make_cells(found) if cell.best is not None]
    points = [
        LossPoint(cell.trial.batch_size, cell.trial.num_updates, loss)
        for cell in cells
        if cell.best is not None
        for loss in cell.best.seed_scores
        if loss is not None
    ]
    try:
        optimum = fit_optimum(points, samples=bench.num_rows)
        form = fit_loss(points).chosen
    except AnalysisError:
        return None
    if optimum is not None:
        size = bench.size(optimum.batch_size)
    elif form == "steps":  # smaller is always better at a given number of samples
        size = min(bench.target.batch_sizes)
    elif form == "batch":
        size = max(bench.target.batch_sizes)
    else:
        return None
    near = min(cells, key=lambda cell: abs(math.log2(cell.trial.batch_size / size)))
    assert near.best is not None
    expected = bench.pair.carried(rate_between(near) or near.best.learning_rate)
    lab, cell = bench.at_target(size, expected, step=1.5)
    return choice_of(cell, bench.cost(lab, searched))


RULES: dict[str, Rule] = {
    "constant 16": constant(16),
    "smaller is better (1)": constant(1),
    "constant 128": constant(128),
    "square-root rule": square_root,
    "`get_lr`-style formula": formula,
    "proxy by smaller data": smaller_data,
    "three-term law": three_terms,
    "proxy, the paper's recipe": paper,
    "`tune` without neighbours": without_neighbours,
    "`tune`": tuned,
}


@dataclass(frozen=True)
class Case:
    """One rule on one pair. `regret` None: it declined. `fresh` against the fixed sweep's choice.

    Both are fractions of a loss, `cost` of the fixed sweep's FLOPs, `time` of its seconds on a
    device, where any are known.
    """

    family: str
    rule: str
    regret: float | None
    fresh: float | None
    cost: float | None
    time: float | None = None


def simulated_cases(
    family: str,
    *,
    num_pairs: int,
    cost_ratio: float,
    first_seed: int = 0,
    far: bool = False,
    rules: Iterable[str] = tuple(RULES),
) -> list[Case]:
    """Every rule on so many pairs of a family."""
    cases = list[Case]()
    for seed in range(first_seed, first_seed + num_pairs):
        pair = make_pair(family, seed, cost_ratio=cost_ratio, far=far)
        cases += cases_of(pair, seed=seed, rules=rules)
    return cases


def cases_of(pair: Pair, *, seed: int, rules: Iterable[str]) -> list[Case]:
    """The rules on one simulated pair, and the fixed sweep itself."""
    target = pair.target
    bench = Bench(
        pair.proxy,
        target,
        cost_ratio=pair.cost_ratio,
        less_data=with_less_data(target, pair.cost_ratio, seed=seed),
    )
    swept = grid_choice(
        [target.trial(*key) for key in sweep_of(NUM_ROWS) if key[0] in target.batch_sizes]
    )
    reference = None if swept is None else _fresh_loss(target, *swept)
    cases = list[Case]()
    if swept is not None:
        cases.append(Case(target.family, "fixed sweep", target.regret(*swept), 0.0, 1.0))
    for name in rules:
        chosen = RULES[name](bench)
        if chosen is None:
            cases.append(Case(target.family, name, None, None, None))
            continue
        point = chosen.batch_size, chosen.learning_rate
        fresh = None if reference is None else _fresh_loss(target, *point) / reference - 1
        cases.append(Case(target.family, name, target.regret(*point), fresh, chosen.cost))
    return cases


def with_less_data(problem: Problem, factor: float, *, seed: int) -> Problem:
    """The problem on a `factor` of its rows: its best batch sizes are smaller by factor^p.

    An assumption, not fitted to anything recorded here: p is drawn between the published exponents
    and nothing but the depth of the valley over batch size moves.
    """
    exponent = float(np.random.default_rng([29, seed]).uniform(*DATA_EXPONENTS))
    doublings = -exponent * math.log2(factor)
    shift = doublings / 4
    surface, shape = list(problem.surface), problem.shape
    a0, a1, a2 = surface[:3]
    surface[0] = a0 - a1 * shift + a2 * shift**2
    surface[1] = a1 - 2 * a2 * shift
    if problem.family in ("kink", "kinked_cliff", "step"):
        shape = (shape[0], shape[1] + shift)
    if problem.family == "shifted":
        shape = (shape[0] * 2**doublings,)
    return replace(problem, surface=tuple(surface), shape=shape, seed=problem.seed + 1)


@dataclass(frozen=True)
class Row:
    """A rule over all cases: fractions. `good` has a 95% Wilson interval, `fresh` a t interval.

    `good`: regret at most 0.5%; `both`: and cost at most 5%; a rule that declined is neither.
    """

    rule: str
    num_cases: int
    num_declined: int
    good: float
    good_low: float
    good_high: float
    both: float
    median: float
    worst_tenth: float
    fresh: float
    fresh_half: float
    cost: float
    cost_worst_tenth: float
    time: float


def row_of(cases: Sequence[Case]) -> Row:
    """One rule's cases in one row."""
    regrets = [one.regret for one in cases if one.regret is not None]
    costs = [one.cost for one in cases if one.cost is not None]
    times = [one.time for one in cases if one.time is not None]
    fresh = [one.fresh for one in cases if one.fresh is not None]
    num_good = sum(regret <= TOLERATED for regret in regrets)
    num_both = sum(
        one.regret is not None
        and one.cost is not None
        and one.regret <= TOLERATED
        and one.cost <= MOST_COST
        for one in cases
    )
    low, high = wilson(num_good, len(cases))
    half = math.nan
    if len(fresh) > 1:
        error = float(np.std(fresh, ddof=1)) / math.sqrt(len(fresh))
        half = t_quantile(0.975, df=len(fresh) - 1) * error
    return Row(
        rule=cases[0].rule,
        num_cases=len(cases),
        num_declined=len(cases) - len(regrets),
        good=num_good / len(cases),
        good_low=low,
        good_high=high,
        both=num_both / len(cases),
        median=float(np.median(regrets)) if regrets else math.nan,
        worst_tenth=float(np.quantile(regrets, 0.9)) if regrets else math.nan,
        fresh=float(np.mean(fresh)) if fresh else math.nan,
        fresh_half=half,
        cost=float(np.mean(costs)) if costs else math.nan,
        cost_worst_tenth=float(np.quantile(costs, 0.9)) if costs else math.nan,
        time=float(np.mean(times)) if times else math.nan,
    )


def rows_of(cases: Sequence[Case]) -> list[Row]:
    """A row for every rule, in the order of the cases."""
    names = dict.fromkeys(one.rule for one in cases)
    return [row_of([one for one in cases if one.rule == name]) for name in names]


HEADER = (
    "| rule | regret <= 0.5%, % of cases | and cost <= 5% | regret: median, 90th, % | "
    "loss above the fixed sweep's choice, fresh seeds, % | cost: mean, 90th, % | declined |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


TIMED_HEADER = "\n".join(
    line + more
    for line, more in zip(HEADER.split("\n"), (" GPU-seconds, % |", " --- |"), strict=True)
)


def timed_line(row: Row) -> str:
    """A row of the table under `TIMED_HEADER`."""
    return f"{table_line(row)} {100 * row.time:.1f} |"


def table_line(row: Row) -> str:
    """A row as Markdown."""
    return (
        f"| {row.rule} | {100 * row.good:.0f} [{100 * row.good_low:.0f}, "
        f"{100 * row.good_high:.0f}] | {100 * row.both:.0f} | {100 * row.median:.2f}, "
        f"{100 * row.worst_tenth:.2f} | {100 * row.fresh:+.2f} +- {100 * row.fresh_half:.2f} | "
        f"{100 * row.cost:.1f}, {100 * row.cost_worst_tenth:.1f} | {row.num_declined} |"
    )


def families(*, held_out: bool) -> tuple[str, ...]:
    """The names of the families that are held out, or of the others."""
    return tuple(one.name for one in FAMILIES if one.held_out == held_out)


@cache
def sweep_of(num_rows: int) -> tuple[tuple[int, float, int], ...]:
    """The (batch size, LR, seed) of the fixed sweep that `loratune tune` compares with."""
    study = fixed_sweep(_request(num_rows), model="target", rank=8).study
    return tuple(product(study.batch_size, study.learning_rates(), study.seeds.grid))


@cache
def studies_of_proxy(num_rows: int) -> tuple[Study, ...]:
    """The shipped searches on a proxy, the finest first."""
    return tuple(one.study for one in proxy_studies(_request(num_rows), model="proxy", rank=8))


def _request(num_rows: int) -> Request:
    """For data that leaves so many rows to train on, beside those that are held out."""
    held_out = max(1, min(MOST_HELD_OUT, num_rows // (HELD_OUT_SHARE - 1)))
    return Request(
        data="demo:task",
        fields="  prompt: question\n  response: answer",
        template="alpaca",
        num_rows=num_rows + held_out,
        methods=("lora",),
        precision="float32",
    )


@cache
def _target_study(sizes: tuple[int, ...], rates: tuple[float, ...]) -> Study:
    # Its batch sizes are given, so that the rows change nothing.
    return target_study(
        _request(NUM_ROWS),
        model="target",
        rank=8,
        kind="target",
        batch_sizes=sizes,
        learning_rates=rates,
    ).study


def _tune(bench: Bench, by: str) -> Choice | None:
    found, searched = bench.search(by)
    answer = proxy_answer(found, method="lora")
    if answer.batch_size is None:
        return None
    lab = bench.target_lab()
    at_size, beside = list[TrialResult](), list[TrialResult]()

    def train(sizes: tuple[int, ...], rates: tuple[float, ...]) -> Sequence[TrialResult]:
        results = lab.run(_target_study(sizes, rates))
        (at_size if sizes == (answer.batch_size,) else beside)[:] = results
        return results

    search_target(
        train,
        batch_size=answer.batch_size,
        expected=expected_rate(found, answer, pair=bench.pair),
        sizes=bench.target.batch_sizes,
    )
    final = recommend_by_proxy(found, at_size, beside, pair=bench.pair)
    if final.batch_size is None or final.learning_rate is None:
        return None
    return Choice(final.batch_size, final.learning_rate, bench.cost(lab, searched))


def _train(lab: Lab) -> Callable[[tuple[int, ...], tuple[float, ...]], Sequence[TrialResult]]:
    return lambda sizes, rates: lab.run(_target_study(sizes, rates))


def choice_of(cell: Cell | None, cost: float) -> Choice | None:
    """A searched batch size with the best LR that was found there."""
    if cell is None or cell.best is None:
        return None
    return Choice(cell.trial.batch_size, cell.best.learning_rate, cost)


def _planned_trials(study: Study) -> int:
    """As `plan` counts them: the grid, and further seeds at three LRs."""
    num_rates = len(study.learning_rates())
    of_cell = num_rates * len(study.seeds.grid) + min(3, num_rates) * study.seeds.around_best
    return of_cell * len(study.batch_size)


def _fresh_loss(problem: Problem, batch_size: int, learning_rate: float) -> float:
    """The mean over fresh seeds; a trial that diverged is as bad as an untrained model."""
    losses = [
        problem.trial(batch_size, learning_rate, FIRST_FRESH + index).loss
        for index in range(NUM_FRESH)
    ]
    worst = problem.floor + problem.scale * problem.initial_loss
    return math.fsum(worst if loss is None else loss for loss in losses) / NUM_FRESH


def _result(
    model: str, size: int, rate: float, seed: int, end: Trained, *, num_rows: int
) -> TrialResult:
    num_updates = math.ceil(num_rows / size)
    trial = replace(
        _template(model, num_rows),
        trial_id=f"{model}-{size}-{rate:g}-{seed}",
        batch_size=size,
        learning_rate=rate,
        seed=seed,
        num_updates=num_updates,
        last_batch_size=num_rows - (num_updates - 1) * size,
    )
    return TrialResult(
        study=model,
        select_on="validation_loss",
        trial=trial,
        status="diverged" if end.loss is None else "done",
        outcome=Outcome(
            trial_id=trial.trial_id,
            status="diverged" if end.loss is None else "done",
            num_updates=num_updates,
            train_loss=end.loss,
            validation_loss=end.loss,
            seconds=1.0,
            num_tokens=round(end.tokens),
            peak_memory_bytes=None,
            rows_per_microbatch=None,
        ),
        scores=(),
        engine="reference",
    )


@cache
def _template(model: str, num_rows: int) -> Trial:
    """A trial of the shipped study; its batch size, LR and seed are replaced."""
    study = studies_of_proxy(num_rows)[0].model_copy(update={"model": (model,)})
    facts = replace(declared_model_facts(model, _SHAPE), provisional=False)
    data = DataFacts("rows", num_rows, 512, 1, 1, 1, 1)
    return plan_trials(
        study,
        models={model: facts},
        data={(model, rows): data for rows in study.data.rows},
    )[0]


_SHAPE = DeclaredModel(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=128,
)

"""The answer of a proxy: batch size and LR are searched on a smaller model, then on the target.

The recipe of "Beware of the Batch Size", section 4.4: a smaller model of the family, a low rank,
and *all* of the data, since the best batch size grows with the data and hardly moves with rank and
model. The batch size is carried over; the LR follows by a law that is stated, and is then looked
for on the target itself at that batch size, so that a wrong law costs a few trials and no answer.

To the recipe three things are added, each of which lowers the regret in simulations that are fitted
to recorded sweeps (docs/decisions.md has the table): LRs are read off between those tried, by a
parabola; the target is trained once at half and at twice the batch size, at the best LR; and where
a higher LR diverged, the answer keeps away from it. What lies further than a factor of two from the
proxy's batch size is still the recipe's assumption, and every answer says over what it was
extrapolated. Only held-out loss is known here.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from loratune.analyse.cells import Cell, TriedRate, make_cells
from loratune.analyse.laws.between import rate_between
from loratune.analyse.laws.published import WIDTH_EXPONENTS
from loratune.analyse.scores import method_label
from loratune.errors import AnalysisError
from loratune.recommendation.grid import (
    DEFAULT_MARGIN,
    Recommendation,
    ScoreAtLearningRate,
    recommendations,
)
from loratune.records import ModelFacts, TrialResult

# LoRA Without Regret (Schulman et al. 2025): the best LR of LoRA goes with (2000 / width)^p, with p
# fitted for two families. For others p = 0: the LR is taken over as it is.
_EXPONENTS = {
    "llama": WIDTH_EXPONENTS["llama"],
    "qwen2": WIDTH_EXPONENTS["qwen"],
    "qwen3": WIDTH_EXPONENTS["qwen"],
}
# The LRs of the target: the expected one, and so many times lower and higher. Chosen, as the next
# two, by the regret on simulated pairs of models (families that are not held out).
RATE_STEP = 1.5
# An LR read off between two others is trained where it is this far from all that were.
WORTH_TRYING = 1.1
# An answer is so many times below the lowest LR at which the target diverged.
DISTANCE_TO_DIVERGENCE = 1.8
# An LR that far below it is as good as just there; two digits are kept of each.
NEAR_ENOUGH = 1.25
_SLACK = 1.05

# Trains the target at every batch size with every LR, and gives the results of all trials that this
# asks for, further LRs beyond an end among them; None where there is no time left.
TrainTarget = Callable[[tuple[int, ...], tuple[float, ...]], Sequence[TrialResult] | None]


@dataclass(frozen=True, slots=True)
class ModelOfPair:
    """One model of a pair, as far as the answer needs it. FLOPs are those of training a token."""

    name: str
    model_type: str | None
    num_parameters: int
    hidden_size: int
    rank: int
    flops_per_token: float


@dataclass(frozen=True, slots=True)
class ProxyPair:
    """A proxy, its target, and the FLOPs of the fixed sweep that it saves; beside the results.

    `method` is the LoRA variant of both; `folder` the proxy's results folder, from the target's.
    """

    proxy: ModelOfPair
    target: ModelOfPair
    sweep_flops: float
    method: str
    folder: str

    def to_json(self) -> str:
        """As it is kept in the results folder."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "ProxyPair":
        """What `to_json` wrote.

        Raises:
            AnalysisError: it is something else.
        """
        try:
            read = json.loads(text)
            return ProxyPair(
                ModelOfPair(**read["proxy"]),
                ModelOfPair(**read["target"]),
                sweep_flops=float(read["sweep_flops"]),
                method=str(read["method"]),
                folder=str(read["folder"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise AnalysisError(
                f"not what `loratune tune` wrote about its proxy: {error}"
            ) from error

    @property
    def width_exponent(self) -> float:
        """p of the law that carries the LR; 0 where the family has none."""
        types = {self.proxy.model_type, self.target.model_type}
        (shared,) = types if len(types) == 1 else (None,)
        return _EXPONENTS.get(shared or "", 0.0)

    def carried(self, learning_rate: float) -> float:
        """The LR that the law expects on the target: times (proxy width / target width)^p."""
        return learning_rate * math.pow(
            self.proxy.hidden_size / self.target.hidden_size, self.width_exponent
        )

    def law(self) -> str:
        """The law in words."""
        if self.width_exponent == 0:
            return "taken over as it is, since no law is known for this family,"
        return (
            f"LoRA Without Regret's law, (width {self.proxy.hidden_size} / "
            f"{self.target.hidden_size})^{self.width_exponent:g},"
        )

    def extrapolated_over(self) -> tuple[str, ...]:
        """What differs between the two, in words."""
        over = [
            f"model: {self.proxy.name} ({_millions(self.proxy.num_parameters)}) to "
            f"{self.target.name} ({_millions(self.target.num_parameters)})"
        ]
        if self.proxy.rank != self.target.rank:
            over.append(f"rank: {self.proxy.rank} to {self.target.rank}")
        return tuple(over)


def model_of_pair(facts: ModelFacts, *, rank: int, flops_per_token: float) -> ModelOfPair:
    """What the answer needs of a model's facts."""
    return ModelOfPair(
        name=facts.source,
        model_type=facts.model_type,
        num_parameters=facts.num_parameters,
        hidden_size=facts.hidden_size,
        rank=rank,
        flops_per_token=flops_per_token,
    )


def proxy_answer(
    proxy_results: Sequence[TrialResult], *, method: str, margin: float = DEFAULT_MARGIN
) -> Recommendation:
    """What the proxy's own sweep says of a method; it has one model, rank and N.

    Raises:
        AnalysisError: it has no trials of the method, or more than one curve of them.
    """
    answers = recommendations(proxy_results, method=method, margin=margin)
    if len(answers) != 1:
        raise AnalysisError(
            f"a proxy's study has one curve over batch size, this one {len(answers)}; "
            "give one model, rank and number of rows"
        )
    return answers[0]


def expected_rate(
    proxy_results: Sequence[TrialResult], answer: Recommendation, *, pair: ProxyPair
) -> float:
    """The LR to expect on the target: the proxy's, read off between those tried, carried by law."""
    assert answer.learning_rate is not None
    of_method = [one for one in proxy_results if method_label(one) == pair.method]
    (cell,) = [cell for cell in make_cells(of_method) if cell.trial.batch_size == answer.batch_size]
    return pair.carried(rate_between(cell) or answer.learning_rate)


def search_rate(
    train: TrainTarget, *, batch_size: int, expected: float, step: float = RATE_STEP
) -> Cell | None:
    """The target at one batch size: three LRs about the expected one, then one between them.

    Where the best of the three lies at an end, `train` adds LRs beyond it. None where there was no
    time for that.
    """
    tried = train((batch_size,), _rounded([expected / step, expected, expected * step]))
    if tried is None:
        return None
    (cell,) = make_cells(tried)
    more = rate_between(cell)
    rates = [rate.learning_rate for rate in cell.rates]
    if more is None or min(abs(math.log(more / rate)) for rate in rates) < math.log(WORTH_TRYING):
        return cell
    tried = train((batch_size,), _rounded([*rates, more]))
    return None if tried is None else make_cells(tried)[0]


def search_target(
    train: TrainTarget, *, batch_size: int, expected: float, sizes: Sequence[int]
) -> None:
    """Train what an answer for the target needs; `recommend_by_proxy` reads it from the results.

    Args:
        train: see `TrainTarget`. Half and twice the batch size are asked for together.
        batch_size: the proxy's.
        expected: `expected_rate`.
        sizes: the batch sizes that may be recommended.
    """
    cell = search_rate(train, batch_size=batch_size, expected=expected)
    if cell is None or cell.best is None or cell.lr_at_edge:
        return
    if (safe := _safe_rate(cell)) is not None:
        rates = [rate.learning_rate for rate in cell.rates]
        tried = train((batch_size,), _rounded([*rates, safe]))
        if tried is None:
            return
        (cell,) = make_cells(tried)
    chosen = _chosen([cell])
    assert chosen is not None
    beside = tuple(size for size in sorted(sizes) if size in (batch_size / 2, batch_size * 2))
    if beside:
        train(beside, (chosen[1].learning_rate,))


def recommend_by_proxy(
    proxy_results: Sequence[TrialResult],
    target_results: Sequence[TrialResult],
    beside_results: Sequence[TrialResult] = (),
    *,
    pair: ProxyPair,
    margin: float = DEFAULT_MARGIN,
) -> Recommendation:
    """The recommendation for the target: the best of what was trained on it.

    That is at the proxy's batch size, or at half or twice that (`beside_results`) where the target
    scored better there. `evidence` is that of the proxy's sweep, on which the batch size stands;
    `confirmed` are the target's scores. The range and the acceptable batch sizes are the proxy's,
    less what the target itself contradicts (`_contradicted`); where the target's best is not the
    proxy's, nothing of the kind is known of the target, and they are None. Undecided where the
    proxy is, where the target has no LR with a score, or where its best one lies at the end of
    those tried.

    Raises:
        AnalysisError: the two were trained on other rows, or the target's trials are not of the
            proxy's batch size and method.
    """
    on_proxy = proxy_answer(proxy_results, method=pair.method, margin=margin)
    undecided = [f"on the proxy {pair.proxy.name}: {reason}" for reason in on_proxy.undecided]
    cell: Cell | None = None
    if target_results:
        _check_same_rows(proxy_results, target_results)
        cells = make_cells(target_results)
        if len(cells) != 1 or cells[0].method != on_proxy.method:
            raise AnalysisError(
                f"the target's study should have one cell, of {on_proxy.method}; it has "
                f"{', '.join(f'{one.method} at {one.trial.batch_size}' for one in cells)}"
            )
        (cell,) = cells
        if not undecided and cell.trial.batch_size != on_proxy.batch_size:
            undecided.append(
                f"the proxy now says batch size {on_proxy.batch_size}, and the target was trained "
                f"at {cell.trial.batch_size}; run tune again"
            )
    if not undecided:
        undecided += _of_target(cell, pair)
    beside = _beside(target_results, beside_results, on_proxy)
    cells = () if cell is None else (cell, *beside)
    chosen = None if undecided else _chosen(cells)
    notes = (
        f"the scores over batch size are those of {pair.proxy.name}; that {pair.target.name} has "
        "its best batch size near is the recipe's assumption, not a measurement",
        *(f"on {pair.proxy.name}: {note}" for note in on_proxy.evidence.notes),
        *_law_note(on_proxy, cell, pair),
        *_chosen_notes(cells, chosen, on_proxy, pair, margin),
    )
    answer = replace(
        on_proxy,
        model=pair.target.name,
        rank=pair.target.rank,
        batch_size=None,
        batch_size_low=None,
        batch_size_high=None,
        learning_rate=None,
        acceptable_batch_sizes=None,
        # Which is fastest on the target was not measured.
        fastest_acceptable_batch_size=None,
        rows_per_microbatch=None,
        gradient_accumulation_steps=None,
        evidence=replace(on_proxy.evidence, notes=notes),
        extrapolated_over=pair.extrapolated_over(),
        cost_fraction=_cost_fraction(proxy_results, (*target_results, *beside_results), pair),
        undecided=tuple(undecided),
        confirmed=tuple(score for one in cells for score in _scores(one)),
        proxy=pair.proxy.name,
    )
    if chosen is None:
        return answer
    of_cell, rate = chosen
    size = of_cell.trial.batch_size
    microbatch = _rows_per_microbatch(of_cell)
    answer = replace(
        answer,
        batch_size=size,
        learning_rate=rate.learning_rate,
        rows_per_microbatch=microbatch,
        gradient_accumulation_steps=None if microbatch is None else math.ceil(size / microbatch),
    )
    if size != on_proxy.batch_size:
        return answer
    worse = _contradicted(cells, chosen, margin)
    assert on_proxy.batch_size_low is not None
    assert on_proxy.batch_size_high is not None
    tried = [one.batch_size for one in on_proxy.evidence.scores if one.score is not None]
    kept = [
        one
        for one in tried
        if on_proxy.batch_size_low <= one <= on_proxy.batch_size_high
        and not _beyond(one, worse, size)
    ]
    return replace(
        answer,
        batch_size_low=min(kept),
        batch_size_high=max(kept),
        acceptable_batch_sizes=tuple(
            one for one in on_proxy.acceptable_batch_sizes or () if not _beyond(one, worse, size)
        ),
    )


def _beside(
    target: Sequence[TrialResult], beside: Sequence[TrialResult], on_proxy: Recommendation
) -> tuple[Cell, ...]:
    """The cells beside the proxy's batch size; those of an earlier answer of the proxy are not."""
    if not beside or not target or on_proxy.batch_size is None:
        return ()
    _check_same_rows(target, beside)
    return tuple(
        cell
        for cell in make_cells(beside)
        if cell.method == on_proxy.method
        and cell.trial.batch_size in (on_proxy.batch_size / 2, on_proxy.batch_size * 2)
    )


def _safe_rate(cell: Cell) -> float | None:
    """The highest LR that is far enough below any that diverged, where it is worth a trial.

    It is where the best LR is nearer to divergence than that, and none was tried just below.
    """
    if cell.best is None or not cell.diverged_rates:
        return None
    highest = min(cell.diverged_rates) / DISTANCE_TO_DIVERGENCE
    if cell.best.learning_rate <= _SLACK * highest:
        return None
    near = [
        rate
        for rate in cell.rates
        if highest / NEAR_ENOUGH <= rate.learning_rate <= _SLACK * highest
    ]
    return None if near else highest


def _chosen(cells: Sequence[Cell]) -> tuple[Cell, TriedRate] | None:
    """The best LR of all cells among those far enough below any that diverged.

    Where none is far enough, the lowest LRs are chosen from.
    """
    tried = [
        (cell, rate)
        for cell in cells
        for rate in cell.rates
        if rate.verdict == "eligible" and rate.mean is not None
    ]
    if not tried:
        return None
    bounds = [bound for cell in cells for bound in cell.diverged_rates]
    highest = max(rate.learning_rate for _, rate in tried)
    if bounds:
        lowest = min(rate.learning_rate for _, rate in tried)
        highest = max(_SLACK * min(bounds) / DISTANCE_TO_DIVERGENCE, lowest)
    best: tuple[Cell, TriedRate] | None = None
    for cell, rate in tried:
        if rate.learning_rate > highest or rate.mean is None:
            continue
        if best is None or best[1].mean is None or cell.metric.better(rate.mean, best[1].mean):
            best = cell, rate
    return best


def _contradicted(
    cells: Sequence[Cell], chosen: tuple[Cell, TriedRate], margin: float
) -> dict[int, float | None]:
    """Batch sizes that the target scored worse than the chosen one, by more than the margin.

    With the best score there, None where all diverged. What was measured by one trial may be luck;
    that takes a batch size away from what is claimed, and adds none.
    """
    of_chosen = chosen[1].mean
    assert of_chosen is not None
    found = dict[int, float | None]()
    for cell in cells:
        size = cell.trial.batch_size
        if size == chosen[0].trial.batch_size:
            continue
        if cell.best is None or cell.best.mean is None:
            if cell.diverged_rates:
                found[size] = None
        elif abs(cell.best.mean - of_chosen) > margin * abs(of_chosen):
            found[size] = cell.best.mean
    return found


def _beyond(size: int, worse: Iterable[int], chosen: int) -> bool:
    """Whether a batch size is one of the worse ones, or farther from the chosen one than one is."""
    return any(size <= one < chosen or chosen < one <= size for one in worse)


def _chosen_notes(
    cells: Sequence[Cell],
    chosen: tuple[Cell, TriedRate] | None,
    on_proxy: Recommendation,
    pair: ProxyPair,
    margin: float,
) -> list[str]:
    """What the target said of the batch sizes beside, and how near divergence is."""
    if chosen is None:
        return []
    notes = list[str]()
    cell, rate = chosen
    carried = cells[0].best
    if cell.trial.batch_size != on_proxy.batch_size and carried is not None:
        notes.append(
            f"{pair.target.name} scored better at batch size {cell.trial.batch_size} than at the "
            f"{on_proxy.batch_size} of {pair.proxy.name}, {rate.mean:.4g} ({_seeds(rate)}) against "
            f"{carried.mean:.4g} ({_seeds(carried)}); which others are as good there, and how far "
            f"off its best may be, is not known: what {pair.proxy.name} says of that is not "
            "claimed, and batch sizes farther on were not tried"
        )
    elif len(cells) == 1:
        notes.append(f"no batch size beside {on_proxy.batch_size} was tried on {pair.target.name}")
    else:
        worse = _contradicted(cells, chosen, margin)
        notes += [
            f"batch size {size} is left out of what {pair.proxy.name} allows: {pair.target.name} "
            + (
                "diverged there"
                if score is None
                else f"scored more than {100 * margin:g}% worse there, {score:.4g} against "
                f"{rate.mean:.4g}"
            )
            for size, score in sorted(worse.items())
        ]
    bounds = sorted({bound for one in cells for bound in one.diverged_rates})
    if bounds:
        notes.append(
            f"{pair.target.name} diverged at learning rate {bounds[0]:g}; the answer keeps a "
            f"factor of {DISTANCE_TO_DIVERGENCE:g} below it where one was tried that low"
        )
    return notes


def _seeds(rate: TriedRate) -> str:
    count = sum(score is not None for score in rate.seed_scores)
    return "1 seed" if count == 1 else f"{count} seeds"


def _rounded(rates: Sequence[float]) -> tuple[float, ...]:
    """To two digits, ascending, each once."""
    return tuple(sorted({float(f"{rate:.2g}") for rate in rates}))


def _check_same_rows(proxy: Sequence[TrialResult], target: Sequence[TrialResult]) -> None:
    """The same rows as tokens: the same data, template, hold-out and tokenizer."""
    prints = [{one.trial.data_fingerprint for one in results} for results in (proxy, target)]
    if prints[0] != prints[1]:
        raise AnalysisError(
            "proxy and target were trained on different rows (other data, or another tokenizer), "
            "so that nothing can be carried over; run tune with a proxy of the same family"
        )


def _of_target(cell: Cell | None, pair: ProxyPair) -> list[str]:
    name = pair.target.name
    if cell is None:
        return [f"no trial of {name} has finished; run tune again to go on"]
    if cell.best is None:
        if all(rate.verdict == "diverged" for rate in cell.rates):
            lowest = min(rate.learning_rate for rate in cell.rates)
            return [f"{name} diverged at every learning rate tried, down to {lowest:g}"]
        return [f"no learning rate of {name} has a score with every seed; run tune again to go on"]
    if cell.lr_at_edge and len(cell.rates) > 1:
        return [
            f"the best learning rate of {name}, {cell.best.learning_rate:g}, is at the end of "
            "those tried; a better one may lie beyond: add some to the study and run it"
        ]
    return []


def _law_note(on_proxy: Recommendation, cell: Cell | None, pair: ProxyPair) -> list[str]:
    if on_proxy.learning_rate is None:
        return []
    expected = pair.carried(on_proxy.learning_rate)
    note = (
        f"the best learning rate on {pair.proxy.name} is {on_proxy.learning_rate:g}; {pair.law()} "
        f"gives {expected:.2g} for {pair.target.name}"
    )
    if cell is not None and cell.best is not None:
        off = f"{cell.best.learning_rate / expected:.2g}"
        found = "just that" if off == "1" else f"{cell.best.learning_rate:g}, {off} times that"
        note += f"; the best one tried there is {found}"
    return [note]


def _scores(cell: Cell) -> tuple[ScoreAtLearningRate, ...]:
    return tuple(
        ScoreAtLearningRate(
            batch_size=cell.trial.batch_size,
            learning_rate=rate.learning_rate,
            score=rate.mean,
            num_seeds=sum(score is not None for score in rate.seed_scores),
            verdict=rate.verdict,
        )
        for rate in cell.rates
    )


def _rows_per_microbatch(cell: Cell) -> int | None:
    held = [
        one.outcome.rows_per_microbatch
        for one in cell.results
        if one.outcome is not None and one.outcome.rows_per_microbatch is not None
    ]
    size = cell.trial.batch_size
    return max(rows for rows in range(1, max(held) + 1) if size % rows == 0) if held else None


def _cost_fraction(
    proxy: Sequence[TrialResult], target: Sequence[TrialResult], pair: ProxyPair
) -> float:
    """FLOPs trained for the method, of both models, over those of the fixed sweep on the target."""
    of_method = [one for one in proxy if method_label(one) == pair.method]
    spent = _tokens(of_method) * pair.proxy.flops_per_token
    spent += _tokens(target) * pair.target.flops_per_token
    return spent / pair.sweep_flops


def _tokens(results: Sequence[TrialResult]) -> int:
    return sum(one.outcome.num_tokens for one in results if one.outcome is not None)


def _millions(num_parameters: int) -> str:
    if num_parameters >= 10**9:
        return f"{num_parameters / 10**9:.3g}B parameters"
    return f"{num_parameters / 10**6:.3g}M parameters"

"""The answer of a proxy: batch size and LR are searched on a smaller model, the LR is confirmed.

The recipe of "Beware of the Batch Size", section 4.4: a smaller model of the family, a low rank,
and *all* of the data, since the best batch size grows with the data and hardly moves with rank and
model. The batch size is carried over; the LR follows by a law that is stated, and is then looked
for on the target itself at that batch size, so that a wrong law costs a few trials and no answer.

Only held-out loss is known here. That the best batch size is the same on both models is the
recipe's assumption: the target is trained at one batch size alone, so it cannot be seen to fail,
and every answer says over what it was extrapolated.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from loratune.analyse.cells import Cell, make_cells
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
WIDTH_EXPONENTS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}


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
        return WIDTH_EXPONENTS.get(shared or "", 0.0)

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


def recommend_by_proxy(
    proxy_results: Sequence[TrialResult],
    target_results: Sequence[TrialResult],
    *,
    pair: ProxyPair,
    margin: float = DEFAULT_MARGIN,
) -> Recommendation:
    """The recommendation for the target: the batch size is the proxy's, the LR its own.

    `evidence` is that of the proxy's sweep, on which the batch size stands; `confirmed` are the
    target's scores at that batch size. Undecided where the proxy is, where the target has no LR
    with a score, or where its best one lies at the end of those tried.

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
    confirmed = () if cell is None else _scores(cell)
    notes = (
        f"the scores over batch size are those of {pair.proxy.name}; that {pair.target.name} has "
        "the same best batch size is the recipe's assumption, not a measurement",
        *(f"on {pair.proxy.name}: {note}" for note in on_proxy.evidence.notes),
        *_law_note(on_proxy, cell, pair),
    )
    trial = None if cell is None else cell.trial
    decided = cell is not None and cell.best is not None and not undecided
    microbatch = _rows_per_microbatch(cell) if decided and cell is not None else None
    steps = (
        None if microbatch is None or trial is None else math.ceil(trial.batch_size / microbatch)
    )
    return replace(
        on_proxy,
        model=pair.target.name,
        rank=pair.target.rank,
        batch_size=on_proxy.batch_size if decided else None,
        batch_size_low=on_proxy.batch_size_low if decided else None,
        batch_size_high=on_proxy.batch_size_high if decided else None,
        learning_rate=cell.best.learning_rate if decided and cell and cell.best else None,
        acceptable_batch_sizes=on_proxy.acceptable_batch_sizes if decided else None,
        # Which is fastest on the target was not measured: it was trained at one batch size.
        fastest_acceptable_batch_size=None,
        rows_per_microbatch=microbatch,
        gradient_accumulation_steps=steps,
        evidence=replace(on_proxy.evidence, notes=notes),
        extrapolated_over=pair.extrapolated_over(),
        cost_fraction=_cost_fraction(proxy_results, target_results, pair),
        undecided=tuple(undecided),
        confirmed=confirmed,
    )


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
        off = cell.best.learning_rate / expected
        note += f"; the best one there is {cell.best.learning_rate:g}, {off:.2g} times that"
    return [note]


def _scores(cell: Cell) -> tuple[ScoreAtLearningRate, ...]:
    return tuple(
        ScoreAtLearningRate(
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

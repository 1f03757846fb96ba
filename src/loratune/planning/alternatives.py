"""What cheaper versions of a study would cost: an adaptive search, and a search on a proxy.

Estimates for the decision whether to run the study as it is, from the mean cost of its own trials.
Each asks the same question, the best batch size and LR of every curve; neither gives every cell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from typing import Literal

from loratune.planning.cost import TrialCost
from loratune.planning.search_space import USUAL_SHARE, most_trials
from loratune.records import Trial
from loratune.study.identity import cell_key
from loratune.study.schema import Study

# What `tune` trains on a target: three LRs and one between them at the proxy's batch size, and the
# best one at half and at twice that.
TRIALS_OF_TARGET = 6
# Of an epoch: at larger batch sizes nothing is swept or searched.
FEWEST_UPDATES = 8
# How much smaller a proxy is where none is known.
ASSUMED_RATIO = 1 / 16


@dataclass(frozen=True, slots=True)
class Alternative:
    """A cheaper version of a study. Totals over all of its curves.

    `num_trials` are usual, `most_trials` the most there may be, None where nothing bounds them
    beforehand; of a proxy they are the proxy's and the target's together. `flops` and `hours` are
    those of the usual number; `share` is of the study's own FLOPs. `basis` says what they are from.
    """

    kind: Literal["adaptive", "proxy"]
    num_trials: int
    most_trials: int | None
    flops: float
    hours: float
    share: float
    basis: str

    def to_json(self) -> dict[str, object]:
        """The record under its own names."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ProxySearch:
    """How `tune` searches a proxy: batch sizes, LRs, and seeds added at the best and beside it."""

    batch_sizes: Sequence[int]
    num_rates: int
    further_seeds: int

    def num_trials(self, num_train_rows: int) -> int:
        """At the batch sizes that leave updates enough, where no best LR lies at an end."""
        most = num_train_rows // FEWEST_UPDATES
        sizes = sum(size <= most for size in self.batch_sizes) or 1
        return sizes * (self.num_rates + self.further_seeds * min(3, self.num_rates))


def adaptive_alternative(
    study: Study, trials: Sequence[Trial], costs: Sequence[TrialCost], *, flops: float
) -> Alternative | None:
    """The study by an adaptive search; None where it is one, or has a single point to try.

    Args:
        study: the study.
        trials: its planned trials.
        costs: theirs.
        flops: of the study in all.
    """
    if study.learning_rate.search is not None or not _searches(study):
        return None
    cells = _once(trials, costs)
    num_curves = len(cells) // len(study.batch_size)
    fresh = study.seeds.confirm
    most = num_curves * (most_trials(study) + fresh)
    usual = num_curves * (round(USUAL_SHARE * most_trials(study)) + fresh)
    of_one = fsum(cost.flops for _, cost in cells.values()) / len(cells)
    seconds = fsum(cost.seconds for _, cost in cells.values()) / len(cells)
    return Alternative(
        kind="adaptive",
        num_trials=usual,
        most_trials=most,
        flops=usual * of_one,
        hours=usual * seconds / 3600,
        share=usual * of_one / flops,
        basis=f"at most {most_trials(study)} trials a curve, of which a search usually takes "
        f"{100 * USUAL_SHARE:.0f}%",
    )


def proxy_alternative(
    study: Study,
    trials: Sequence[Trial],
    costs: Sequence[TrialCost],
    *,
    flops: float,
    proxies: Mapping[str, tuple[str, float]],
    search: ProxySearch,
) -> Alternative | None:
    """The study by `tune` with a proxy, curve by curve; None where it has a single point to try.

    Args:
        study: the study.
        trials: its planned trials.
        costs: theirs.
        flops: of the study in all.
        proxies: for each model that has one its proxy and how much smaller that is, a fraction;
            for others it is taken to be `ASSUMED_RATIO`.
        search: what `tune` trains on the proxy.
    """
    if not _searches(study):
        return None
    models = list(dict.fromkeys(trial.model for trial in trials))
    cells = _once(trials, costs)
    total, of_all, seconds = 0.0, 0.0, 0.0
    for trial, cost in cells.values():
        ratio = proxies[trial.model][1] if trial.model in proxies else ASSUMED_RATIO
        # Every cell stands for its share of a curve.
        on_proxy = search.num_trials(trial.num_train_rows) / len(study.batch_size)
        on_target = TRIALS_OF_TARGET / len(study.batch_size)
        total += on_proxy + on_target
        of_all += (on_proxy * ratio + on_target) * cost.flops
        seconds += (on_proxy * ratio + on_target) * cost.seconds
    named = [
        f"{proxies[model][0]} in the place of {model} ({proxies[model][1]:.2g} of its size, by the "
        "names)"
        if model in proxies
        else f"no smaller model is known for {model}: one of {ASSUMED_RATIO:.2g} of its size is "
        "assumed, to be named by --proxy"
        for model in models
    ]
    return Alternative(
        kind="proxy",
        num_trials=round(total),
        most_trials=None,
        flops=of_all,
        hours=seconds / 3600,
        share=of_all / flops,
        basis="; ".join(named),
    )


def _searches(study: Study) -> bool:
    several = study.learning_rate.search is not None or len(study.learning_rates()) > 1
    return several or len(study.batch_size) > 1


def _once(
    trials: Sequence[Trial], costs: Sequence[TrialCost]
) -> dict[tuple[object, ...], tuple[Trial, TrialCost]]:
    """One trial of every cell: those of a cell cost the same."""
    cells = dict[tuple[object, ...], tuple[Trial, TrialCost]]()
    for trial, cost in zip(trials, costs, strict=True):
        cells.setdefault(cell_key(trial), (trial, cost))
    return cells

"""`tune`: the batch size and LR for a model and data, by a proxy where there is one.

Steps, each of which goes on where it was stopped: the sweep on the proxy, the target at the batch
size that the proxy answers, the target at half and twice that, the answer. Without a proxy the
target itself is swept. Where a budget is given, steps stop when it is over, and the answer is what
can be said by then.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.errors import ModelError, StudyError
from loratune.folder import ResultsFolder, open_results, write_whole
from loratune.models.load import default_precision
from loratune.models.proxies import propose_proxy
from loratune.new_study import (
    SWEEP_BATCH_SIZES,
    finest_grid,
    fixed_sweep,
    grid_study,
    proxy_studies,
    read_request,
    target_study,
)
from loratune.planning.build import make_plan
from loratune.planning.cost import H100
from loratune.progress import readable_seconds
from loratune.recommendation.proxy import (
    ModelOfPair,
    ProxyPair,
    expected_rate,
    model_of_pair,
    proxy_answer,
    search_target,
)
from loratune.records import FINAL_STATUSES, TrialResult
from loratune.study.loading import LoadedStudy
from loratune.training import Interrupted
from loratune.workshop import choose_device, measured_flops_per_second, survey

if TYPE_CHECKING:
    from loratune.sweep import Sweep

# A proxy of a rank above this searches longer and finds the same batch size (the paper's Fig. 2a).
LOW_RANK = 8
# What the proxy's search may take of a budget; the target has the rest.
SHARE_OF_PROXY = 0.6
# How much longer training takes than its FLOPs at the rate of plain blocks: adapters, optimizer,
# validation, steps that are not full. A guess from the demo study; where it is wrong the deadline
# still holds.
TRAINING_OVER_BLOCKS = 2.0
# To write what is under way, the report and the answer.
SECONDS_TO_END = 10.0

# Runs a study into a folder, or goes on: (study, folder, should_stop).
Run = Callable[[LoadedStudy, Path, Callable[[], bool]], "Sweep"]


@dataclass(frozen=True)
class Tuning:
    """What is asked of `tune`. `proxy` is a model, "auto" or None; `budget_seconds` wall time."""

    model: str
    data: str
    out: Path
    method: str
    rank: int
    proxy: str | None
    proxy_rank: int | None
    device: str | None
    budget_seconds: float | None
    started: float
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        budget = self.budget_seconds
        if budget is not None and not 0 < budget < float("inf"):
            raise StudyError(
                f"budget of {budget:g} seconds; give a positive time, such as 2h or 90m"
            )
        if self.proxy_rank is not None and not 1 <= self.proxy_rank <= self.rank:
            raise StudyError(
                f"proxy rank {self.proxy_rank}; give a whole number from 1 to the rank {self.rank}"
            )


def tune(
    asked: Tuning,
    *,
    run: Run,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Train what the answer needs into `asked.out`; `recommend` reads it there.

    Args:
        asked: the request.
        run: trains a study.
        should_stop: asked after every update; True ends with snapshots.
        say: told the studies that are run and what was found, in plain words.

    Raises:
        LoratuneError: the request is wrong; nothing was written.
        training.Interrupted: `should_stop` said so; the same call goes on.
    """
    precision = default_precision(choose_device(asked.device))
    request = read_request(data=asked.data, methods=[asked.method], precision=precision)
    name = _proxy_name(asked, say)
    if name is None:
        loaded = grid_study(request, model=asked.model, rank=asked.rank)
        say(loaded.text)
        _within(asked, 1.0, loaded, asked.out, run, should_stop, say)
        return
    rank = asked.proxy_rank or min(asked.rank, LOW_RANK)
    studies = proxy_studies(request, model=name, rank=rank)
    # Everything that can be refused is refused before anything is trained.
    sweep = fixed_sweep(request, model=asked.model, rank=asked.rank)
    folder = ResultsFolder(asked.out)
    pair = pair_of(
        studies[0],
        sweep,
        method=asked.method,
        folder=folder.proxy.name,
        trust_remote_code=asked.trust_remote_code,
    )
    _, search_flops, _ = _model_of(studies[0], trust_remote_code=asked.trust_remote_code)
    first = finest_grid(search_flops / pair.sweep_flops)
    searched = _affordable(asked, studies, say, first=first)
    say(searched.text)
    if not _within(asked, SHARE_OF_PROXY, searched, folder.proxy, run, should_stop, say):
        results = _results_of(folder.proxy)
        trained = sum(one.status in FINAL_STATUSES for one in results)
        say(
            f"the proxy's share of the budget is over after {trained} of {len(results)} trials: "
            "the same command with a longer --budget goes on with the others"
        )
    write_whole(folder.proxy_pair, pair.to_json())
    found = _results_of(folder.proxy)
    answer = proxy_answer(found, method=asked.method)
    if answer.batch_size is None or answer.learning_rate is None:
        return  # `recommend` says why.
    carried_size = answer.batch_size

    def train(sizes: tuple[int, ...], rates: tuple[float, ...]) -> Sequence[TrialResult] | None:
        at_size = sizes == (carried_size,)
        carried = target_study(
            request,
            model=asked.model,
            rank=asked.rank,
            kind="target" if at_size else "beside",
            batch_sizes=sizes,
            learning_rates=rates,
        )
        say(carried.text)
        place = folder.root if at_size else folder.beside
        if not _within(asked, 1.0, carried, place, run, should_stop, say):
            say(f"the budget is over: {place} holds what was trained; the same command goes on")
            return None
        return _results_of(place)

    search_target(
        train,
        batch_size=carried_size,
        expected=expected_rate(found, answer, pair=pair),
        sizes=request.sizes_of(SWEEP_BATCH_SIZES),
    )


def _results_of(place: Path) -> Sequence[TrialResult]:
    _, store, record = open_results(place)
    with store:
        return store.results(record.name, with_losses=False)


def _within(
    asked: Tuning,
    share: float,
    loaded: LoadedStudy,
    out: Path,
    run: Run,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> bool:
    """Run the study until it is done (True) or the share of the budget is over (False)."""
    deadline = (
        float("inf")
        if asked.budget_seconds is None
        else asked.started + share * max(0.0, asked.budget_seconds - SECONDS_TO_END)
    )

    def is_over() -> bool:
        return time.monotonic() > deadline

    try:
        run(loaded, out, lambda: should_stop() or is_over())
    except Interrupted:
        if should_stop() or not is_over():
            raise
        return False
    return True


def _proxy_name(asked: Tuning, say: Callable[[str], None]) -> str | None:
    """The proxy that was named, or is known for the model's family and can be had."""
    if asked.proxy != "auto":
        return asked.proxy
    proposed = propose_proxy(asked.model)
    if proposed is None:
        say(f"no smaller model is known for {asked.model}: it is swept itself; name one by --proxy")
    return proposed


def _affordable(
    asked: Tuning, studies: Sequence[LoadedStudy], say: Callable[[str], None], *, first: int
) -> LoadedStudy:
    """The finest of the proxy's studies that its share of the budget has time for, or the last.

    From the FLOPs of each and the rate at which this device runs the proxy's own blocks now. None
    before the `first`, none that could not tell one batch size from another, and none coarser than
    one that was begun, whose trials a finer one takes over.
    """
    begun = ResultsFolder(ResultsFolder(asked.out).proxy).study
    text = begun.read_text(encoding="utf-8") if begun.is_file() else None
    last = next((at for at, one in enumerate(studies) if one.text == text), len(studies) - 1)
    telling = [one for one in studies[first : last + 1] if len(one.study.batch_size) > 1]
    studies = telling or [studies[min(first, last)]]
    if asked.budget_seconds is None:
        return studies[0]
    device = choose_device(asked.device)
    (model,) = studies[0].study.model
    rate = measured_flops_per_second(
        model, device=device, precision=studies[0].study.precision, folder=studies[0].folder
    )
    left = asked.started + SHARE_OF_PROXY * asked.budget_seconds - time.monotonic()
    needed = 0.0
    for loaded in studies:
        found = survey(loaded, download=True, trust_remote_code=asked.trust_remote_code)
        plan = make_plan(loaded.study, models=found.models, data=found.data, rate=H100)
        needed = TRAINING_OVER_BLOCKS * plan.flops / rate
        if needed <= left:
            return loaded
    say(
        f"the coarsest search on {model} takes about {readable_seconds(needed)} here, and the "
        f"budget leaves it {readable_seconds(max(0.0, left))}: the answer may stay undecided"
    )
    return studies[-1]


def pair_of(
    searched: LoadedStudy,
    sweep: LoadedStudy,
    *,
    method: str,
    folder: str,
    trust_remote_code: bool = False,
) -> ProxyPair:
    """What is known of a proxy and its target before the target is trained.

    Args:
        searched: a study of the proxy.
        sweep: the fixed sweep of the target, on the same rows.
        method: the LoRA variant of both.
        folder: the proxy's results folder, from the target's.

    Raises:
        ModelError: the proxy is no smaller than the target, or makes other tokens of the rows.
    """
    proxy, _, proxy_rows = _model_of(searched, trust_remote_code=trust_remote_code)
    target, sweep_flops, rows = _model_of(sweep, trust_remote_code=trust_remote_code)
    if proxy_rows != rows:
        raise ModelError(
            f"proxy {proxy.name} makes other tokens of the rows than {target.name}; "
            "choose a proxy with the same tokenizer, a smaller model of the same family"
        )
    if proxy.num_parameters >= target.num_parameters:
        raise ModelError(
            f"proxy {proxy.name} has {proxy.num_parameters:,} parameters, {target.name} "
            f"{target.num_parameters:,}; choose a smaller one, or --proxy none to sweep the model "
            "itself"
        )
    return ProxyPair(proxy, target, sweep_flops, method, folder)


def _model_of(
    loaded: LoadedStudy, *, trust_remote_code: bool
) -> tuple[ModelOfPair, float, frozenset[str]]:
    """A study's one model, the FLOPs of the study, and the fingerprints of its rows."""
    found = survey(loaded, download=True, trust_remote_code=trust_remote_code)
    plan = make_plan(loaded.study, models=found.models, data=found.data, rate=H100)
    (facts,) = found.models.values()
    model = model_of_pair(
        facts, rank=loaded.study.rank[0], flops_per_token=plan.flops / plan.tokens
    )
    return model, plan.flops, frozenset(one.fingerprint for one in found.data.values())

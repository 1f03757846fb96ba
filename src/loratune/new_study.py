"""Studies that are written for somebody who has a model and data, and no study file.

Each is complete: what `tune` and `compare` choose stands in it and can be changed. Paths are
absolute, since its only copy lies in its results folder.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loratune.data.fields import detect_fields
from loratune.data.sources import read_rows
from loratune.planning.alternatives import FEWEST_UPDATES
from loratune.study.loading import LoadedStudy, parse_study
from loratune.study.methods import describe
from loratune.study.schema import Source, source_of

# What `tune` and `compare` sweep: wide enough for an interior optimum on most data, one seed to
# find the best LRs and two more around them, so that an interval exists. Batch sizes stop where an
# epoch would have fewer than 8 updates.
GRID_BATCH_SIZES = (2, 8, 32, 128)
GRID_LEARNING_RATES = "{values: [1e-4, 2e-4, 5e-4, 1e-3, 2e-3], extend: 4}"
# A proxy is cheap: every power of two, with two learning rates from which the search walks to the
# best one, which gets neighbours and seeds. The second, with fewer seeds, is for proxies whose
# search would be dear beside the target, those after it for when time is short; each is part of
# those before it, which take its trials over when there is more time. Never fewer rows: the best
# batch size moves with them.
PROXY_GRIDS = (
    ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "[5e-4, 2e-3]", 2),
    ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "[5e-4, 2e-3]", 1),
    ((1, 4, 16, 64, 256), "[5e-4, 2e-3]", 1),
    ((4, 16, 64), "[5e-4, 2e-3]", 1),
)
# What the finest search on a proxy is planned to cost of a fixed sweep on the target, in FLOPs. Up
# to the first, all stays below 5% with it, since the target's own trials are 2% to 3%; up to the
# second it does with the next one alone; above that with neither, and seeds are worth more.
CHEAP_SEARCH, DEAR_SEARCH = 0.01, 0.02
# What a fixed sweep would train, for a cost to be a fraction of.
SWEEP_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HELD_OUT_SHARE, MOST_HELD_OUT = 10, 512


@dataclass(frozen=True)
class Request:
    """What somebody has: data with fields that could be told, and how it is to be trained."""

    data: str
    fields: str
    template: str
    num_rows: int
    methods: tuple[str, ...]
    precision: str

    @property
    def num_held_out(self) -> int:
        """Rows that choose: a tenth, at most 512."""
        return max(1, min(MOST_HELD_OUT, self.num_rows // HELD_OUT_SHARE))

    def sizes_of(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those of the batch sizes at which an epoch has updates enough."""
        most = max(1, (self.num_rows - self.num_held_out) // FEWEST_UPDATES)
        return tuple(size for size in sizes if size <= most) or (1,)


def read_request(*, data: str, methods: Sequence[str], precision: str) -> Request:
    """Look at the data: how many rows, and which fields are prompt and response.

    `precision` is that of the study's base.

    Raises:
        LoratuneError: no such data or method, or fields that can't be told; it lists the columns.
    """
    for name in methods:
        describe(name)
    rows = read_rows(Source.model_validate(source_of(data)), folder=Path.cwd())
    fields = detect_fields(rows)
    chosen = {key: value for key, value in dataclasses.asdict(fields).items() if value is not None}
    return Request(
        data=_absolute(data),
        fields="\n".join(f"  {key}: {json.dumps(value)}" for key, value in chosen.items()),
        template="chat" if fields.messages is not None else "alpaca",
        num_rows=len(rows),
        methods=tuple(methods),
        precision=precision,
    )


def grid_study(request: Request, *, model: str, rank: int) -> LoadedStudy:
    """A sweep of batch size and LR on the model itself."""
    # A best of many is flattered by its luck; what is compared gets seeds that chose nothing.
    confirm = ", confirm: 5" if len(request.methods) > 1 else ""
    return _study(
        request,
        kind="tuned",
        model=model,
        rank=rank,
        batch_sizes=request.sizes_of(GRID_BATCH_SIZES),
        learning_rates=GRID_LEARNING_RATES,
        seeds=f"{{grid: 1, around_best: 2{confirm}}}",
    )


def proxy_studies(request: Request, *, model: str, rank: int) -> tuple[LoadedStudy, ...]:
    """The sweep on a proxy, a smaller model at a low rank with all data; the finest first."""
    return tuple(
        _study(
            request,
            kind="proxy",
            model=model,
            rank=rank,
            batch_sizes=request.sizes_of(sizes),
            learning_rates=f"{{values: {rates}, extend: 4}}",
            seeds=f"{{grid: 1, around_best: {further}}}",
        )
        for sizes, rates, further in PROXY_GRIDS
    )


def finest_grid(share_of_sweep: float) -> int:
    """The first of `PROXY_GRIDS` to take, where the finest costs this share of the fixed sweep."""
    return 1 if CHEAP_SEARCH < share_of_sweep <= DEAR_SEARCH else 0


def target_study(
    request: Request,
    *,
    model: str,
    rank: int,
    kind: Literal["target", "beside"],
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
) -> LoadedStudy:
    """The target at these batch sizes and LRs, and at LRs beyond an end where the best one is.

    One seed: on recorded sweeps two seeds differ by a tenth of a percent near the best LR, and
    what an LR between those tried gains is more.
    """
    return _study(
        request,
        kind=kind,
        model=model,
        rank=rank,
        batch_sizes=batch_sizes,
        learning_rates=f"{{values: {json.dumps(list(learning_rates))}, extend: 6}}",
        seeds="1",
    )


def fixed_sweep(request: Request, *, model: str, rank: int) -> LoadedStudy:
    """What tuning on the target itself would train: batches 1 to 512, the paper's LRs, 3 seeds."""
    return _study(
        request,
        kind="sweep",
        model=model,
        rank=rank,
        batch_sizes=request.sizes_of(SWEEP_BATCH_SIZES),
        learning_rates="paper",
        seeds="3",
    )


def _study(
    request: Request,
    *,
    kind: str,
    model: str,
    rank: int,
    batch_sizes: Sequence[int],
    learning_rates: str,
    seeds: str,
) -> LoadedStudy:
    # Another model or data set is another study, which its results folder then refuses; a finer
    # grid is the same one.
    identity = json.dumps([_absolute(model), request.data, list(request.methods), rank])
    text = _TEXT.format(
        name=f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}",
        model=json.dumps(_absolute(model)),
        precision=request.precision,
        train=json.dumps(request.data),
        fields=request.fields,
        template=request.template,
        held_out=request.num_held_out,
        methods=json.dumps(list(request.methods)),
        rank=rank,
        batch_sizes=json.dumps(list(batch_sizes)),
        learning_rates=learning_rates,
        seeds=seeds,
    )
    return parse_study(text, name="the study made for you", folder=Path.cwd())


def _absolute(name: str) -> str:
    """A path that exists as an absolute one; anything else, such as a hub id, as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


_TEXT = """\
# Written for you; every key can be changed, and `loratune run` takes the file as it is.
study: {name}
model: {model}
precision: {precision}          # of the frozen base; the adapter is float32
data:
  train: {train}
{fields}
  template: {template}
  max_tokens: 1024
  too_long: drop
  validation: {{rows: {held_out}}}   # held out by equal prompts; they choose the LR and batch size
protocol: {{kind: fixed_samples, epochs: 1}}
methods: {methods}
rank: {rank}
alpha: rank
targets: all-linear
batch_size: {batch_sizes}
learning_rate: {learning_rates}
seeds: {seeds}          # further seeds where they decide something
schedule: {{kind: cosine, warmup_ratio: 0.0}}
select_on: validation_loss
keep_adapters: best
"""

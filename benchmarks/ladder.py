"""The ladder of demo models: full grids of batch size, LR and seed, and the rules on its pairs.

    python benchmarks/ladder.py record --out DIR --minutes 9
    python benchmarks/ladder.py noise --out DIR
    python benchmarks/ladder.py table DIR/demo-1m.csv DIR/demo-4m.csv ...

`record` trains every demo model that is there (demo:12m and demo:28m are made by
tools/pretrain_demo_models.py) on demo:task, through `loratune run`, and writes a CSV for each model
once its grid is done. It stops after --minutes with exit code 3; the same command goes on. `noise`
measures the noise scale of every model, in one trial a seed that no grid is needed for. `table`
takes every pair of recorded models as proxy and target, and applies the rules of `rules.py`.

A rule asks for LRs that were not recorded. Between two that were, the log loss of a batch size and
seed is interpolated by a monotone cubic in log LR (PCHIP, whose lowest point is a recorded one);
beyond the recorded LRs it goes on as it went at the end where it rises there, and where it falls
nothing is known, so that the rule has no answer. A diverged trial has no loss, and neither has what
lies beyond it. The fixed sweep, of which a cost is a part and with whose choice a rule's is
compared, is that of `loratune tune` on so many rows; its LRs are not those recorded, and its losses
are read off in the same way. Recorded seeds take turns: some choose, the others are fresh, and
every turn is a case; cases of one pair are not independent of each other.
"""

import argparse
import csv
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

from scipy.interpolate import PchipInterpolator

from loratune import api
from loratune.analyse.laws.published import lora_learning_rate
from loratune.errors import ModelError
from loratune.folder import open_results
from loratune.models.demo import DEMO_MODELS, resolve_demo_model
from loratune.planning.build import make_plan
from loratune.planning.cost import H100
from loratune.records import TrialResult
from loratune.study.loading import LoadedStudy, parse_study
from loratune.training import Interrupted
from loratune.workshop import choose_device, survey
from rules import (
    RULES,
    TIMED_HEADER,
    UNINFORMED_STEP,
    Bench,
    Case,
    Choice,
    Rule,
    choice_of,
    rows_of,
    sweep_of,
    timed_line,
)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LEARNING_RATES = (3.2e-4, 6.4e-4, 1.3e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
NUM_ROWS, NUM_SEEDS = 3584, 6
COLUMNS = (
    "method", "batch_size", "learning_rate", "seed", "validation_loss", "tokens", "flops", "seconds"
)  # fmt: skip
WIDTHS = {"demo-1m": 128, "demo-4m": 256, "demo-12m": 384, "demo-28m": 512}
UNFINISHED = 3

_STUDY = """\
study: ladder-{size}
model: demo:{size}
precision: {precision}
data:
  train: demo:task
  prompt: "Question: {{question}}\\nAnswer:"
  response: answer
  template: plain
  max_tokens: 128
  rows: {rows}
  validation: {{rows: 512}}
protocol: {{kind: fixed_samples, epochs: 1}}
methods: [lora]
rank: 8
alpha: rank
targets: all-linear
batch_size: {batch_sizes}
learning_rate: {learning_rates}
seeds: {seeds}
schedule: {{kind: cosine}}
select_on: validation_loss
keep_adapters: none
"""
# Before any grid: a usual batch size and a formula's LR.
_NOISE_STUDY = _STUDY + "noise_scale: {{every: 10}}\n"
NOISE_BATCH_SIZE = 16
NOISE_COLUMNS = ("seed", "verdict", "noise_scale", "low", "high")


@dataclass(frozen=True)
class Grid:
    """What is trained of every model."""

    batch_sizes: tuple[int, ...] = BATCH_SIZES
    learning_rates: tuple[float, ...] = LEARNING_RATES
    num_rows: int = NUM_ROWS
    num_seeds: int = NUM_SEEDS

    def study(self, model: str, *, precision: str, form: str = _STUDY) -> LoadedStudy:
        """The study of one demo model."""
        text = form.format(
            size=model.removeprefix("demo:"),
            precision=precision,
            rows=self.num_rows,
            batch_sizes=list(self.batch_sizes),
            learning_rates=list(self.learning_rates),
            seeds=self.num_seeds,
        )
        return parse_study(text, name="ladder", folder=Path.cwd())


def record(
    models: Sequence[str], grid: Grid, *, out: Path, minutes: float, device: str | None
) -> bool:
    """Train what is not trained yet, within the minutes; whether all of it is done."""
    deadline = time.monotonic() + 60 * minutes
    precision = _precision(device)
    for model in models:
        loaded = grid.study(model, precision=precision)
        folder = out / model.replace(":", "-")
        try:
            api.run(
                loaded,
                out=folder,
                device=device,
                quiet=True,
                should_stop=lambda: time.monotonic() > deadline,
            )
        except Interrupted:
            done = sum(one.outcome is not None for one in _results(folder))
            print(f"{model}: {done} trials done; the same command goes on", file=sys.stderr)
            return False
        _write_csv(loaded, folder)
        print(f"{model}: {folder}.csv", file=sys.stderr)
    return True


def _precision(device: str | None) -> str:
    return "bfloat16" if choose_device(device).type == "cuda" else "float32"


def measure_noise(
    models: Sequence[str], *, num_rows: int, num_seeds: int, out: Path, device: str | None
) -> None:
    """Train one trial a seed with probes, and write the Adam-scaled noise scales of each model."""
    for model in models:
        stem = model.replace(":", "-")
        rate = lora_learning_rate(WIDTHS[stem], family="llama")
        grid = Grid((NOISE_BATCH_SIZE,), (rate,), num_rows, num_seeds)
        loaded = grid.study(model, precision=_precision(device), form=_NOISE_STUDY)
        folder = out / f"{stem}-noise"
        api.run(loaded, out=folder, device=device, quiet=True)
        measured = api.noise_scale(folder)
        chosen = measured[
            (measured.split == "train")
            & (measured.coordinates == "adam")
            & (measured.block == "all")
        ]
        path = noise_path(out / f"{stem}.csv")
        chosen.to_csv(path, columns=list(NOISE_COLUMNS), index=False, float_format="%.4g")
        print(f"{model}: {path}", file=sys.stderr)


def noise_path(grid: Path) -> Path:
    """Where the noise scales of a recorded grid's model are."""
    return grid.with_name(f"{grid.stem}-noise.csv")


def _results(folder: Path) -> tuple[TrialResult, ...]:
    _, store, study = open_results(folder)
    with store:
        return store.results(study.name, with_losses=False)


def _write_csv(loaded: LoadedStudy, folder: Path) -> None:
    found = survey(loaded, download=False)
    plan = make_plan(loaded.study, models=found.models, data=found.data, rate=H100)
    with folder.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in _results(folder):
            trial, outcome = one.trial, one.outcome
            assert outcome is not None
            loss = outcome.validation_loss
            tokens = outcome.num_tokens
            writer.writerow(
                [
                    trial.method.name,
                    trial.batch_size,
                    f"{trial.learning_rate:g}",
                    trial.seed,
                    "" if loss is None else f"{loss:.6g}",
                    tokens,
                    f"{tokens * plan.flops / plan.tokens:.4g}",
                    f"{outcome.seconds:.2f}",
                ]
            )


@dataclass(frozen=True)
class End:
    """What a trial came to; see `rules.Trained`."""

    loss: float | None
    tokens: float


class NotRecordedError(Exception):
    """A rule asked for what the grid cannot tell."""


class Recorded:
    """One recorded model, as `rules.Trainer` sees it: tokens are in units of FLOPs.

    `spent` adds up the seconds of what was trained: of each trial the mean of those recorded at its
    batch size, which are its share of a pack's.

    Args:
        path: a CSV that `record` wrote.
        chooses: the recorded seeds that stand for a rule's seeds 0, 1, ..., taken in turn.
    """

    def __init__(self, path: Path, *, chooses: Sequence[int] = (0,)) -> None:
        self.path = path
        self.chooses = tuple(chooses)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.losses = {
            (int(row["batch_size"]), float(row["learning_rate"]), int(row["seed"])): (
                float(row["validation_loss"]) if row["validation_loss"] else None
            )
            for row in rows
        }
        self.batch_sizes = tuple(sorted({size for size, _, _ in self.losses}))
        self.learning_rates = tuple(sorted({rate for _, rate, _ in self.losses}))
        self.seeds = tuple(sorted({seed for _, _, seed in self.losses}))
        whole = [row for row in rows if row["validation_loss"]]
        self.tokens = max(float(row["flops"]) for row in whole)
        self.seconds = math.fsum(float(row["seconds"]) for row in rows)
        self.seconds_of = {
            size: fmean(float(row["seconds"]) for row in rows if int(row["batch_size"]) == size)
            for size in self.batch_sizes
        }
        self.spent = 0.0
        self.noise_scales = _noise_scales(path)

    def trial(self, batch_size: int, learning_rate: float, seed: int) -> End:
        """The loss of a rule's seed; one that diverged is counted as a whole trial.

        Raises:
            NotRecordedError: the LR lies beyond those recorded, on a side where losses fall.
        """
        self.spent += self.seconds_of[batch_size]
        of_seed = self.chooses[seed % len(self.chooses)]
        return End(self.loss(batch_size, learning_rate, of_seed), self.tokens)

    def loss(self, batch_size: int, learning_rate: float, seed: int) -> float | None:
        """The loss of a recorded seed at any LR."""
        known = [
            (math.log(rate), math.log(loss))
            for rate in self.learning_rates
            if (loss := self.losses[batch_size, rate, seed]) is not None
        ]
        diverged = [
            rate
            for rate in self.learning_rates
            if self.losses[batch_size, rate, seed] is None and rate <= learning_rate
        ]
        if diverged or len(known) < 2:
            return None
        xs, ys = (list(column) for column in zip(*known, strict=True))
        x = math.log(learning_rate)
        for end, inner in ((0, 1), (-1, -2)):
            outside = x < xs[0] - 1e-9 if end == 0 else x > xs[-1] + 1e-9
            if outside:
                rise = (ys[end] - ys[inner]) / (xs[end] - xs[inner])
                if rise * (x - xs[end]) <= 0:
                    raise NotRecordedError(f"{self.path.name}: LR {learning_rate:g}")
                return math.exp(ys[end] + rise * (x - xs[end]))
        return math.exp(float(PchipInterpolator(xs, ys)(min(max(x, xs[0]), xs[-1]))))

    def mean(self, batch_size: int, learning_rate: float, seeds: Sequence[int]) -> float:
        """The mean loss over recorded seeds; infinite where one diverged."""
        losses = [self.loss(batch_size, learning_rate, seed) for seed in seeds]
        return math.fsum(math.inf if loss is None else loss for loss in losses) / len(losses)

    def best(
        self, seeds: Sequence[int], *, rates: Sequence[float] | None = None
    ) -> tuple[int, float]:
        """The batch size and LR, a recorded one or of `rates`, with the lowest mean loss.

        Raises:
            NotRecordedError: losses still fall towards one of the rates.
        """
        points = product(self.batch_sizes, rates or self.learning_rates)
        return min(points, key=lambda point: self.mean(*point, seeds))


def _noise_scales(grid: Path) -> dict[int, float | None]:
    """By seed: the noise scale in rows, its lower end where that alone is known, or None."""
    path = noise_path(grid)
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = {int(row["seed"]): row["noise_scale"] or row["low"] for row in rows}
    return {seed: float(value) if value else None for seed, value in known.items()}


def noise_scale_alone(bench: Bench, target: Recorded) -> Choice | None:
    """The batch size that is the target's noise scale, measured in one trial; the LR searched."""
    measured = target.noise_scales.get(target.chooses[0])
    if measured is None:
        return None
    target.spent += target.seconds_of[bench.size(NOISE_BATCH_SIZE)]
    lab, cell = bench.at_target(bench.size(measured), bench.start, step=UNINFORMED_STEP)
    of_trial = target.tokens / bench.sweep_tokens
    return choice_of(cell, bench.cost(lab, of_trial))


def ladder_cases(proxy: Path, target: Path, *, num_rows: int = NUM_ROWS) -> list[Case]:
    """Every rule on a recorded pair, once for each turn of the seeds.

    `regret` is against the recorded point that is best over all recorded seeds, `fresh` against the
    fixed sweep's choice, both on fresh seeds.
    """
    rates = tuple(dict.fromkeys(rate for _, rate, _ in sweep_of(num_rows)))
    seeds = Recorded(target).seeds
    num_fresh = max(1, len(seeds) // 2)
    widths = WIDTHS[proxy.stem], WIDTHS[target.stem]
    cases = list[Case]()
    for turn in range(len(seeds)):
        order = [seeds[(turn + index) % len(seeds)] for index in range(len(seeds))]
        chooses, fresh = order[:-num_fresh], order[-num_fresh:]
        models = [Recorded(path, chooses=chooses) for path in (proxy, target)]
        small, large = models
        best = large.mean(*large.best(seeds), fresh)
        reference = _swept(large, chooses[:3], rates=rates, fresh=fresh)
        sweep = 3 * len(rates) * math.fsum(large.seconds_of.values())
        if reference is not None:
            cases.append(Case(target.stem, "fixed sweep", reference / best - 1, 0.0, 1.0, 1.0))
        rules = {name: rule for name, rule in RULES.items() if name != "proxy by smaller data"}
        if large.noise_scales:
            rules["noise scale alone"] = partial(noise_scale_alone, target=large)
        for name, rule in rules.items():
            bench = Bench(
                small,
                large,
                # Tokens are in FLOPs already.
                cost_ratio=1.0,
                num_rows=num_rows,
                start=lora_learning_rate(widths[1], family="llama"),
                widths=widths,
                model_type="llama",
            )
            for model in models:
                model.spent = 0.0
            chosen = _answer(rule, bench)
            time_spent = (small.spent + large.spent) / sweep
            if chosen is None:
                cases.append(Case(target.stem, name, None, None, None))
                continue
            try:
                loss = large.mean(chosen.batch_size, chosen.learning_rate, fresh)
            except NotRecordedError:
                cases.append(Case(target.stem, name, None, None, None))
                continue
            above = None if reference is None or loss == math.inf else loss / reference - 1
            cases.append(Case(target.stem, name, loss / best - 1, above, chosen.cost, time_spent))
    return cases


def table(paths: Sequence[Path], *, num_rows: int) -> None:
    """Every rule on every pair of recorded models, the smaller the proxy of the larger."""
    for index, target in enumerate(paths):
        for proxy in paths[:index]:
            small, large = Recorded(proxy), Recorded(target)
            points = len(large.batch_sizes) * len(large.learning_rates)
            print(
                f"\n{proxy.stem} to {target.stem}: a trial costs {large.tokens / small.tokens:.2g} "
                f"times as many FLOPs; {points} points, {len(large.seeds)} seeds, "
                f"{small.seconds:.0f} s and {large.seconds:.0f} s of training\n"
            )
            print(TIMED_HEADER)
            for row in rows_of(ladder_cases(proxy, target, num_rows=num_rows)):
                print(timed_line(row), flush=True)


def _swept(
    model: Recorded, chooses: Sequence[int], *, rates: Sequence[float], fresh: Sequence[int]
) -> float | None:
    """The fresh loss of the fixed sweep's choice; None where a loss of it is not known."""
    try:
        return model.mean(*model.best(chooses, rates=rates), fresh)
    except NotRecordedError:
        return None


def _answer(rule: Rule, bench: Bench) -> Choice | None:
    try:
        return rule(bench)
    except NotRecordedError:
        return None


def _there(names: Sequence[str] | None) -> tuple[str, ...]:
    """The models asked for, or all that were made."""
    if names is not None:
        return tuple(names)
    found = list[str]()
    for name in DEMO_MODELS:
        try:
            resolve_demo_model(name)
        except ModelError:
            print(f"{name} was not made; see tools/pretrain_demo_models.py", file=sys.stderr)
        else:
            found.append(name)
    return tuple(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    command = commands.add_parser("record", help="train the grids")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--minutes", type=float, default=math.inf)
    command.add_argument("--models", nargs="+", choices=DEMO_MODELS)
    command.add_argument("--device", help="cpu, cuda or cuda:N; left out: a GPU if there is one")
    command.add_argument("--rows", type=int, default=NUM_ROWS)
    command.add_argument("--seeds", type=int, default=NUM_SEEDS)
    command.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    command.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES)
    command = commands.add_parser("noise", help="measure the noise scales")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--models", nargs="+", choices=DEMO_MODELS)
    command.add_argument("--device", help="as for record")
    command.add_argument("--rows", type=int, default=NUM_ROWS)
    command.add_argument("--seeds", type=int, default=NUM_SEEDS)
    command = commands.add_parser("table", help="the rules on recorded grids")
    command.add_argument("paths", type=Path, nargs="+", help="CSVs, the smallest model first")
    command.add_argument("--rows", type=int, default=NUM_ROWS, help="that they were trained on")
    given = parser.parse_args(arguments)
    if given.what == "table":
        table(given.paths, num_rows=given.rows)
        return 0
    if given.what == "noise":
        measure_noise(
            _there(given.models),
            num_rows=given.rows,
            num_seeds=given.seeds,
            out=given.out,
            device=given.device,
        )
        return 0
    grid = Grid(tuple(given.batch_sizes), tuple(given.learning_rates), given.rows, given.seeds)
    finished = record(
        _there(given.models), grid, out=given.out, minutes=given.minutes, device=given.device
    )
    return 0 if finished else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())

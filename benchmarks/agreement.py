"""Whether packed training comes to the same validation loss as the reference engine, in 16 bits.

    python benchmarks/agreement.py --json agreement.json --minutes 9

Every trial (three configurations, ten seeds) is trained three times over one base: by the reference
engine, by the packed engine with all trials in one pack, and by the reference engine with batches
cut otherwise, which moves rounding and nothing else. It is proven where the 95% interval of the
mean difference packed - reference lies within a tenth of the seed-to-seed SD. Exit code 0: proven;
1: refuted; 3: undecided, or not all is trained yet.

What it does not say: anything about other models, data or configurations than those trained.
"""

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from scipy import stats

from kept_results import KeptResults, Minutes
from loratune.data.order import row_order
from loratune.data.prepare import PreparedData
from loratune.data.rows import cut_microbatches
from loratune.engine.base import Engine, Failed, Finished
from loratune.engine.packed import PackedEngine
from loratune.engine.reference import ReferenceEngine
from loratune.models.load import Base, load_base
from loratune.planning.build import DEFAULT_TOKENS_PER_MICROBATCH
from loratune.planning.pack_shape import plan_pack
from loratune.planning.trials import plan_trials
from loratune.records import ModelFacts, Outcome, Trial
from loratune.study.loading import LoadedStudy, parse_study
from loratune.workshop import choose_device, model_source, survey
from many_adapters import ListFeed

REFERENCE, PACKED, OTHER_CUTS = "reference", "packed", "reference, other cuts"
# The goal: the interval lies within this share of the seed-to-seed SD.
SHARE_OF_SD = 0.1
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
EXIT_CODES = {HOLDS: 0, FAILS: 1, UNDECIDED: 3}


@dataclass(frozen=True, slots=True)
class Configuration:
    """What ten trials share; they differ in their seed."""

    method: str
    batch_size: int
    learning_rate: float

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.method}:{self.batch_size}:{self.learning_rate:g}"


# Learning rates at which demo:4m learns its task steadily. At 1e-2 DoRA blows rounding up: two
# seeds' losses in float32, 16 updates, differed by up to 9e-4 between the engines, at 3e-3 by 3e-6.
DEFAULT_CONFIGURATIONS = "lora:4:3e-3,pissa:16:3e-3,dora:16:5e-3"

STUDY = """
study: agreement
model: {model}
precision: {precision}
data:
  train: {train}
  prompt: {prompt}
  response: {response}
  template: {template}
  max_tokens: {max_tokens}
  rows: {rows}
  validation: {{rows: {validation_rows}}}
protocol: {{kind: fixed_samples, epochs: 1}}
methods: [{method}]
rank: {rank}
alpha: 2*rank
targets: all-linear
batch_size: [{batch_size}]
learning_rate: [{learning_rate}]
seeds: {seeds}
schedule: {{kind: cosine, warmup_ratio: 0.0}}
keep_adapters: none
"""


# ---------------------------------------------------------------------------- the statistics


@dataclass(frozen=True, slots=True)
class Difference:
    """Paired differences of final validation losses, in nats; `low` and `high` bound the mean with
    95% confidence (Student's t over all pairs).
    """

    num_pairs: int
    mean: float
    low: float
    high: float
    sd: float
    rms: float
    largest: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Difference":
        """At least two are needed."""
        n = len(differences)
        mean, sd = statistics.fmean(differences), statistics.stdev(differences)
        half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
        return cls(
            num_pairs=n,
            mean=mean,
            low=mean - half,
            high=mean + half,
            sd=sd,
            rms=math.sqrt(statistics.fmean(one * one for one in differences)),
            largest=max(map(abs, differences)),
        )


def seed_sd(losses_by_configuration: Iterable[Sequence[float]]) -> float:
    """The SD between seeds, pooled within configurations: sqrt(sum of squares / sum of (n - 1))."""
    squares, freedom = 0.0, 0
    for losses in losses_by_configuration:
        squares += statistics.variance(losses) * (len(losses) - 1)
        freedom += len(losses) - 1
    return math.sqrt(squares / freedom)


def judge(difference: Difference, *, margin: float) -> tuple[str, str]:
    """The verdict on an interval and `margin` (in nats), and why in words."""
    if -margin < difference.low and difference.high < margin:
        return HOLDS, f"the interval lies within +-{margin:.2g}"
    if difference.low > margin or difference.high < -margin:
        return FAILS, f"the interval lies outside of +-{margin:.2g}"
    room = margin - abs(difference.mean)
    if room <= 0:
        return UNDECIDED, (
            f"the mean lies outside of +-{margin:.2g} and the interval does not: more trials can "
            "only refute it, unless the mean moves"
        )
    return UNDECIDED, (
        f"the interval reaches beyond +-{margin:.2g}; if mean and SD stay, "
        f"{pairs_needed(difference, room=room)} trials would decide it"
    )


def pairs_needed(difference: Difference, *, room: float) -> int:
    """The fewest pairs whose interval has a half width below `room`, at the SD that was seen."""
    n = 2
    while float(stats.t.ppf(0.975, n - 1)) * difference.sd / math.sqrt(n) >= room:
        n += max(1, n // 100)
    return n


# ---------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Bench:
    """One base, its rows, and the trials of every configuration."""

    base: Base
    model: ModelFacts
    data: PreparedData
    trials: Mapping[Configuration, tuple[Trial, ...]]

    def all_trials(self) -> list[Trial]:
        """In order: configuration by configuration, seed by seed."""
        return [trial for trials in self.trials.values() for trial in trials]

    def engine(self, run: str) -> Engine:
        """The engine of one of the three runs."""
        rows = {self.data.facts.fingerprint: self.data}
        if run == PACKED:
            trials = self.all_trials()
            on_cuda = self.base.device.type == "cuda"
            shape = plan_pack(
                trials,
                model=self.model,
                data=[self.data.facts],
                memory_bytes=(
                    torch.cuda.get_device_properties(self.base.device).total_memory
                    if on_cuda
                    else None
                ),
            )
            return PackedEngine(self.base, rows, shape=shape, targets=trials[0].targets)
        return ReferenceEngine(
            self.base, rows, tokens_per_microbatch=lambda trial: self.tokens_at_once(trial, run)
        )

    def tokens_at_once(self, trial: Trial, run: str) -> int:
        """What bounds a micro-batch: a whole batch as a rule, about half of it with other cuts."""
        if run == REFERENCE:
            return DEFAULT_TOKENS_PER_MICROBATCH
        facts = self.data.facts
        half = trial.batch_size * facts.num_tokens / facts.num_train_rows / 2
        return min(int(half), DEFAULT_TOKENS_PER_MICROBATCH // 2)

    def microbatches(self, trial: Trial, run: str) -> float:
        """Micro-batches of an update, in the mean."""
        lengths = self.data.train.lengths
        tokens = self.tokens_at_once(trial, run)
        cuts = [
            len(list(cut_microbatches(lengths[batch], tokens_per_microbatch=tokens)))
            for batch in batches(trial)
        ]
        return statistics.fmean(cuts)


def batches(trial: Trial) -> Iterator[np.ndarray]:
    """The rows of every update."""
    for update in range(trial.num_updates):
        is_last = update == trial.num_updates - 1
        yield row_order(
            trial.seed,
            num_rows=trial.num_train_rows,
            start=update * trial.batch_size,
            count=trial.last_batch_size if is_last else trial.batch_size,
        )


def load_bench(options: argparse.Namespace) -> Bench:
    """Everything that is trained on and with."""
    device = choose_device(options.device)
    trials = dict[Configuration, tuple[Trial, ...]]()
    found = None
    for one in options.configurations:
        loaded = study_of(one, options)
        found = found or survey(loaded, download=False)
        trials[one] = plan_trials(loaded.study, models=found.models, data=found.data)
    assert found is not None
    (model,) = found.models.values()
    (data,) = found.prepared.values()
    source = model_source(options.model, folder=Path.cwd())
    base = load_base(source, precision=options.precision, device=device)
    return Bench(base, model, data, trials)


def study_of(one: Configuration, options: argparse.Namespace) -> LoadedStudy:
    """The study of one configuration."""
    text = STUDY.format(
        **{name: repr(str(getattr(options, name))) for name in ("prompt", "response", "template")},
        **{
            name: getattr(options, name)
            for name in ("model", "precision", "max_tokens", "rows", "validation_rows", "rank")
        },
        train=options.data,
        seeds=options.seeds,
        method=one.method,
        batch_size=one.batch_size,
        learning_rate=repr(one.learning_rate),
    )
    return parse_study(text, name="agreement", folder=Path.cwd())


def train(engine: Engine, trials: Sequence[Trial]) -> Iterator[Outcome]:
    """Every trial's outcome as it comes."""
    for event in engine.train(ListFeed(trials)):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            yield event.outcome


def as_result(outcome: Outcome, **more: Any) -> dict[str, Any]:
    """What is kept of an outcome."""
    return {
        "status": outcome.status,
        "validation_loss": outcome.validation_loss,
        "train_loss": outcome.train_loss,
        "reason": outcome.reason,
        **more,
    }


def key_of(run: str, configuration: Configuration, trial: Trial) -> str:
    """What a result is kept by."""
    return f"{run}/{configuration.name}/seed {trial.seed}"


def train_missing(bench: Bench, kept: KeptResults, minutes: Minutes) -> bool:
    """Train what is not kept yet. False where time ran out first."""
    keys = {
        run: {
            trial.trial_id: key_of(run, configuration, trial)
            for configuration, trials in bench.trials.items()
            for trial in trials
        }
        for run in (PACKED, REFERENCE, OTHER_CUTS)
    }
    # A pack is trained whole or not at all: its point is that all trials are in it.
    if not all(key in kept for key in keys[PACKED].values()):
        if not minutes.allow(PACKED):
            return False
        engine, since = bench.engine(PACKED), time.perf_counter()
        outcomes = list(train(engine, bench.all_trials()))
        seconds = time.perf_counter() - since
        assert isinstance(engine, PackedEngine)
        for outcome in outcomes:
            kept.add(
                keys[PACKED][outcome.trial_id],
                as_result(
                    outcome, seconds=seconds / len(outcomes), pack_shape=asdict(engine.shape)
                ),
            )
        say(f"packed: {len(outcomes)} trials in {seconds:.1f} s")
    for run in (REFERENCE, OTHER_CUTS):
        engine = bench.engine(run)
        for configuration, trials in bench.trials.items():
            kind = f"{run}/{configuration.name}"
            for trial in trials:
                key = keys[run][trial.trial_id]
                if key in kept:
                    continue
                if not minutes.allow(kind):
                    return False
                since = time.perf_counter()
                (outcome,) = train(engine, [trial])
                seconds = time.perf_counter() - since
                minutes.took(kind, seconds)
                kept.add(
                    key,
                    as_result(
                        outcome,
                        seconds=seconds,
                        microbatches_per_update=bench.microbatches(trial, run),
                    ),
                )
                say(f"{key}: {outcome.status}, {outcome.validation_loss}, {seconds:.1f} s")
    return True


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- the answer


@dataclass(frozen=True, slots=True)
class Group:
    """The losses of some trials in the three runs, in one order of trials."""

    name: str
    reference: tuple[float, ...]
    packed: tuple[float, ...]
    other_cuts: tuple[float, ...]
    seconds: Mapping[str, float]

    def packed_difference(self) -> Difference:
        """Packed - reference."""
        return Difference.of([p - r for p, r in zip(self.packed, self.reference, strict=True)])

    def cuts_difference(self) -> Difference:
        """Reference with other cuts - reference."""
        return Difference.of([c - r for c, r in zip(self.other_cuts, self.reference, strict=True)])


def groups_of(bench: Bench, results: Mapping[str, Any]) -> tuple[list[Group], list[str], bool]:
    """The losses of each configuration, remarks on trials that did not end in all runs, and whether
    packing alone decided how one of them ended.
    """
    groups, remarks, packing_decided = list[Group](), list[str](), False
    for configuration, trials in bench.trials.items():
        losses: dict[str, list[float]] = {REFERENCE: [], PACKED: [], OTHER_CUTS: []}
        seconds = dict.fromkeys(losses, 0.0)
        for trial in trials:
            of_runs = {run: results[key_of(run, configuration, trial)] for run in losses}
            statuses = {run: one["status"] for run, one in of_runs.items()}
            if set(statuses.values()) != {"done"}:
                remarks.append(f"{configuration.name}, seed {trial.seed}: {statuses}")
                alike = statuses[REFERENCE] == statuses[OTHER_CUTS]
                packing_decided |= alike and statuses[PACKED] != statuses[REFERENCE]
                continue
            for run, one in of_runs.items():
                losses[run].append(one["validation_loss"])
                seconds[run] += one["seconds"]
        groups.append(
            Group(
                configuration.name,
                tuple(losses[REFERENCE]),
                tuple(losses[PACKED]),
                tuple(losses[OTHER_CUTS]),
                seconds,
            )
        )
    return groups, remarks, packing_decided


def summary_of(
    groups: Sequence[Group], *, num_planned: int, packing_decided: bool
) -> dict[str, Any]:
    """The figures of all trials together, and the verdict."""
    together = Group(
        "all",
        *(
            tuple(loss for group in groups for loss in getattr(group, run))
            for run in ("reference", "packed", "other_cuts")
        ),
        seconds={
            run: math.fsum(group.seconds[run] for group in groups)
            for run in (REFERENCE, PACKED, OTHER_CUTS)
        },
    )
    packed, cuts = together.packed_difference(), together.cuts_difference()
    sd = seed_sd(group.reference for group in groups)
    verdict, why = judge(packed, margin=SHARE_OF_SD * sd)
    if packing_decided:
        verdict = FAILS
        why = "a trial ended in another way in the pack than in both runs of the reference engine"
    elif packed.num_pairs < num_planned and verdict == HOLDS:
        verdict = UNDECIDED
        why = f"only {packed.num_pairs} of {num_planned} trials ended in all three runs"
    return {
        "verdict": verdict,
        "why": why,
        "margin": SHARE_OF_SD * sd,
        "seed_sd": sd,
        "packed_minus_reference": asdict(packed),
        "other_cuts_minus_reference": asdict(cuts),
        "seconds": dict(together.seconds),
    }


def table(groups: Sequence[Group]) -> str:
    """The configurations as a Markdown table; losses and differences in nats."""
    columns = (
        "configuration",
        "trials",
        "loss",
        "seed SD",
        "packed - reference, mean",
        "RMS",
        "largest",
        "other cuts - reference, mean",
        "RMS",
        "largest",
        "s: reference, packed, other cuts",
    )
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for group in groups:
        packed, cuts = group.packed_difference(), group.cuts_difference()
        seconds = (group.seconds[run] for run in (REFERENCE, PACKED, OTHER_CUTS))
        cells = [
            group.name,
            str(packed.num_pairs),
            f"{statistics.fmean(group.reference):.4f}",
            f"{statistics.stdev(group.reference):.2e}",
            *(
                f"{number:.1e}"
                for one in (packed, cuts)
                for number in (one.mean, one.rms, one.largest)
            ),
            ", ".join(f"{one:.1f}" for one in seconds),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def sentences(summary: Mapping[str, Any], *, remarks: Sequence[str]) -> str:
    """The answer in words."""
    packed, cuts = summary["packed_minus_reference"], summary["other_cuts_minus_reference"]
    sd = summary["seed_sd"]
    return "\n".join(
        [
            *(f"not compared: {remark}" for remark in remarks),
            f"packed - reference: mean {packed['mean']:.2e}, 95% interval {packed['low']:.2e} to "
            f"{packed['high']:.2e} ({packed['low'] / sd:+.1%} to {packed['high'] / sd:+.1%} of the "
            f"seed-to-seed SD {sd:.2e}), n = {packed['num_pairs']}",
            f"RMS: packed - reference {packed['rms']:.2e}, reference with other cuts - reference "
            f"{cuts['rms']:.2e}",
            f"{summary['verdict']}: {summary['why']}",
        ]
    )


# ---------------------------------------------------------------------------- command line


def configurations(text: str) -> list[Configuration]:
    """METHOD:BATCH_SIZE:LEARNING_RATE, separated by commas."""
    chosen = list[Configuration]()
    for one in text.split(","):
        try:
            method, batch_size, learning_rate = one.split(":")
            chosen.append(Configuration(method, int(batch_size), float(learning_rate)))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{one!r}; expected METHOD:BATCH_SIZE:LEARNING_RATE, such as lora:4:3e-3"
            ) from error
    return chosen


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:4m", help="as in a study; also a GGUF file")
    parser.add_argument("--precision", default="bfloat16", help="of the frozen base")
    parser.add_argument("--data", default="demo:task", help="as in a study: a file of rows")
    parser.add_argument("--prompt", default="Question: {question}\\nAnswer:")
    parser.add_argument("--response", default="answer")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=256, help="training rows of a trial: one epoch")
    parser.add_argument("--validation-rows", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--configurations",
        type=configurations,
        default=DEFAULT_CONFIGURATIONS,
        help=f"METHOD:BATCH_SIZE:LR, separated by commas; default {DEFAULT_CONFIGURATIONS}",
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--minutes", type=float, help="start no trial that may end later")
    parser.add_argument("--json", type=Path, help="write results here, and go on from it")
    parser.add_argument("--device", help="default: a GPU if there is one")
    options = parser.parse_args(arguments)
    options.prompt = options.prompt.replace("\\n", "\n")
    return options


def main(arguments: Sequence[str], *, load: Callable[..., Bench] = load_bench) -> int:
    """Train, judge, print, write."""
    options = parse(arguments)
    minutes = Minutes(options.minutes)
    bench = load(options)
    settings = {
        name: value
        for name, value in vars(options).items()
        # More seeds or configurations may come later: each result is kept by its own.
        if name not in ("minutes", "json", "device", "configurations", "seeds")
    }
    settings["device"] = device_name(bench.base.device)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    about = {"versions": versions, "python": platform.python_version()}
    kept = KeptResults(options.json, settings=settings, about=about)
    if not train_missing(bench, kept, minutes):
        print(f"out of time: {len(kept.results)} of {3 * len(bench.all_trials())} trained so far")
        return EXIT_CODES[UNDECIDED]
    groups, remarks, packing_decided = groups_of(bench, kept.results)
    for group in groups:
        if len(group.reference) < 2:
            print(f"{group.name}: fewer than two trials ended in all three runs: {remarks}")
            return EXIT_CODES[FAILS if packing_decided else UNDECIDED]
    num_planned = len(bench.all_trials())
    summary = summary_of(groups, num_planned=num_planned, packing_decided=packing_decided)
    kept.write(summary={**summary, "remarks": remarks})
    print(table(groups))
    print(sentences(summary, remarks=remarks))
    return EXIT_CODES[summary["verdict"]]


def device_name(device: torch.device) -> str:
    """What it was measured on."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

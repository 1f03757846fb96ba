"""One study on one device and on several: `loratune run` twice, each in a fresh folder.

    python benchmarks/devices.py --json devices.json
    python benchmarks/devices.py --devices cpu,cpu --model tiny --rows 32 --row-tokens 16

The call is `loratune.run`, as the command line makes it. Several devices come first, so that code
that the second run finds compiled favours the one device. A row counts when its update is reported.
Exit code 0: measured; 1: a trial failed, or a device had nothing to do; 3: out of time.

What it does not cover: several machines, and studies that are too short to fill every device.
"""

import argparse
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch

import loratune.api
from kept_results import KeptResults, Minutes
from loratune.engine.base import Progress
from loratune.progress import ProgressLine
from loratune.records import Trial
from loratune.study.loading import LoadedStudy, load_study
from model_shapes import SHAPES, TARGETS
from random_model import save_random_model

NUM_SEEDS = 4
STUDY = """
study: devices
model: {model}
precision: {precision}
data:
  train: {train}
  prompt: prompt
  response: response
  template: plain
  max_tokens: 512
  rows: {rows}
  validation: {{rows: 32}}
protocol: {{kind: fixed_samples, epochs: 1}}
methods: [lora]
rank: 16
alpha: rank
targets: {targets}
batch_size: [{batch_size}]
learning_rate: {learning_rates}
seeds: {seeds}
schedule: {{kind: cosine, warmup_ratio: 0.0}}
keep_adapters: none
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. Rows/s while training are those from the moment on at which every device trained.

    `seconds` is the whole call: start-up, training, validation, report. `start_up_seconds` end when
    the last device has made its first update, `training_seconds` with the last update.
    """

    devices: str
    num_trials: int
    num_rows: int
    seconds: float
    start_up_seconds: float
    training_seconds: float
    training_rows: int
    trials_by_process: tuple[int, ...]
    statuses: dict[str, int]

    @property
    def training_rows_per_second(self) -> float:
        """Start-up left out; waiting for the slower device at the end is not."""
        return self.training_rows / self.training_seconds

    @property
    def rows_per_second(self) -> float:
        """Of the whole call."""
        return self.num_rows / self.seconds


class NotingLine(ProgressLine):
    """The line of progress that also notes when updates were reported."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self.updates = list[tuple[float, str, int]]()

    def update(self, trial: Trial, progress: Progress) -> None:
        """See `training.Watcher`."""
        self.updates.append((time.perf_counter(), trial.trial_id, progress.num_rows))
        super().update(trial, progress)


def measure(study: LoadedStudy, devices: str, *, out: Path) -> Measured:
    """Run the study in a folder that is not there yet."""
    lines = list[NotingLine]()

    def line(*, quiet: bool) -> NotingLine:
        lines.append(NotingLine(quiet=quiet))
        return lines[-1]

    names = devices.split(",")
    where: dict[str, Any] = {"device": devices} if len(names) == 1 else {"devices": devices}
    begun = time.perf_counter()
    with patch.object(loratune.api, "ProgressLine", line):
        sweep = loratune.api.run(study, out=out, engine="packed", quiet=True, **where)
    seconds = time.perf_counter() - begun
    process_of = processes(out)
    return reckon(
        lines[0].updates,
        process_of,
        devices=devices,
        begun=begun,
        seconds=seconds,
        statuses=sweep.statuses(),
    )


def processes(folder: Path) -> dict[str, int]:
    """The process that trained each trial. The store answers that for studies, not for trials."""
    with closing(sqlite3.connect(folder / "loratune.db")) as database:
        attempts = database.execute("select trial_id, provenance from attempts").fetchall()
    return {trial_id: json.loads(provenance)["pid"] for trial_id, provenance in attempts}


def reckon(
    updates: Sequence[tuple[float, str, int]],
    process_of: Mapping[str, int],
    *,
    devices: str,
    begun: float,
    seconds: float,
    statuses: dict[str, int],
) -> Measured:
    """The figures of a run from its updates: (time, trial, rows)."""
    first = dict[int, float]()
    for at, trial_id, _ in updates:
        first.setdefault(process_of[trial_id], at)
    all_train = max(first.values())
    last = max(at for at, _, _ in updates)
    pids = list(process_of.values())
    return Measured(
        devices=devices,
        num_trials=len(process_of),
        num_rows=sum(rows for _, _, rows in updates),
        seconds=seconds,
        start_up_seconds=all_train - begun,
        training_seconds=last - all_train,
        training_rows=sum(rows for at, _, rows in updates if at > all_train),
        trials_by_process=tuple(pids.count(pid) for pid in dict.fromkeys(pids)),
        statuses=statuses,
    )


def write_study(options: argparse.Namespace, folder: Path) -> LoadedStudy:
    """The study file, and the model and rows that it names, in a folder."""
    model, vocabulary, tokens = options.model, 0, options.row_tokens
    shape = SHAPES.get(options.model)
    if shape is not None:
        model, vocabulary = "model", shape.vocab_size
        if not (folder / "model" / "config.json").is_file():
            save_random_model(shape, folder / "model")
    write_rows(folder / "rows.jsonl", options.rows + 32, tokens=tokens, vocabulary=vocabulary)
    num_rates = -(-options.trials // NUM_SEEDS)
    text = STUDY.format(
        model=model,
        precision=options.precision or ("bfloat16" if torch.cuda.is_available() else "float32"),
        train="rows.jsonl",
        rows=options.rows,
        targets=list(TARGETS),
        batch_size=options.batch_size,
        # Small and never the same: nothing is to be learned from random words, nor to diverge.
        learning_rates=[round(1e-6 * (1 + index), 9) for index in range(num_rates)],
        seeds=NUM_SEEDS,
    )
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return load_study(path)


def write_rows(path: Path, count: int, *, tokens: int, vocabulary: int) -> None:
    """Rows of `tokens` random words, an eighth of them the prompt; digits without a vocabulary."""
    generator = np.random.default_rng(0)
    words = (
        [f"w{index}" for index in range(4, vocabulary)]
        if vocabulary
        else [str(digit) for digit in range(10)]
    )
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            # The end of the row is a token, too.
            chosen = [words[index] for index in generator.integers(len(words), size=tokens - 1)]
            cut = tokens // 8
            row = {"prompt": " ".join(chosen[:cut]), "response": " " + " ".join(chosen[cut:])}
            file.write(json.dumps(row) + "\n")


def table(results: Sequence[Measured]) -> str:
    """The runs as a Markdown table."""
    columns = (
        "devices",
        "trials (by process)",
        "rows",
        "whole call s",
        "start-up s",
        "training s",
        "rows/s while training",
        "rows/s of the whole call",
    )
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for one in results:
        shares = ", ".join(map(str, one.trials_by_process))
        cells = [
            one.devices,
            f"{one.num_trials} ({shares})",
            str(one.num_rows),
            f"{one.seconds:.1f}",
            f"{one.start_up_seconds:.1f}",
            f"{one.training_seconds:.1f}",
            f"{one.training_rows_per_second:.0f}",
            f"{one.rows_per_second:.0f}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="the first also runs alone")
    parser.add_argument(
        "--model", default="135m", help=f"{', '.join(SHAPES)} with random weights, or as in a study"
    )
    parser.add_argument("--precision", help="default: bfloat16, without a GPU float32")
    parser.add_argument("--trials", type=int, default=192, help="a multiple of 4")
    parser.add_argument("--rows", type=int, default=768, help="training rows of a trial: one epoch")
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--minutes", type=float, help="start no run that may end later")
    parser.add_argument("--json", type=Path, help="write results here, and go on from it")
    parser.add_argument("--out", type=Path, help="where folders are made; default: a temporary one")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run, print, write."""
    options = parse(arguments)
    minutes = Minutes(options.minutes)
    one = options.devices.split(",")[0]
    names = ("model", "trials", "rows", "row_tokens", "batch_size", "devices")
    settings = {name: getattr(options, name) for name in names}
    settings["device"] = (
        torch.cuda.get_device_name(torch.device(one))
        if one.startswith("cuda")
        else f"cpu, {os.cpu_count()} cores"
    )
    about = {"versions": {name: version(name) for name in ("torch", "transformers")}}
    kept = KeptResults(options.json, settings=settings, about=about)
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        study = write_study(options, Path(scratch))
        for devices in (options.devices, one):
            if devices in kept:
                continue
            if not minutes.allow("run"):
                break
            measured = measure(study, devices, out=Path(scratch) / devices.replace(",", "+"))
            # The other run is on fewer devices.
            minutes.took("run", measured.seconds * len(options.devices.split(",")))
            kept.add(devices, asdict(measured))
    results = [
        Measured(**{**kept.results[name], "trials_by_process": tuple(shares)})
        for name in (one, options.devices)
        if name in kept
        for shares in [kept.results[name]["trials_by_process"]]
    ]
    print(table(results))
    if len(results) < 2:
        print("out of time: a run is missing; the same command makes it")
        return 3
    alone, together = results
    num_devices, num_trained = len(options.devices.split(",")), len(together.trials_by_process)
    if num_trained < num_devices:
        print(
            f"no comparison: {num_trained} of {num_devices} processes trained all trials before "
            "the others had begun; give more --trials, --rows or a larger --batch-size"
        )
        return 1
    training = together.training_rows_per_second / alone.training_rows_per_second
    whole = together.rows_per_second / alone.rows_per_second
    print(
        f"{options.devices} against {one}: {training:.2f} times the rows/s while training, "
        f"{whole:.2f} times those of the whole call"
    )
    kept.write(ratio_while_training=training, ratio_of_whole_call=whole)
    return 1 if any(set(result.statuses) != {"done"} for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

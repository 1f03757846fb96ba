"""What noise probes cost: one trial trained with and without them in turn, in one process.

    python benchmarks/noise_probes.py
    python benchmarks/noise_probes.py --engine packed --batch 16 --pairs 9

The figure is the ratio of the two times, per pair, and its median; pairs alternate in which comes
first, so that a machine that slows down or is shared favours neither. Every tenth update is probed.

What it does not cover: a CUDA device, where a probed step of the packed engine is not replayed.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from loratune.demonstration import demo_study
from loratune.engine.base import Failed
from loratune.records import NoiseProbe
from loratune.study.loading import LoadedStudy
from loratune.training import Workshop
from loratune.workshop import EngineChoice, LocalWorkshop, choose_device
from many_adapters import ListFeed


def seconds(loaded: LoadedStudy, workshop: Workshop, batch_size: int) -> tuple[float, int]:
    """Wall time of one trial, and how many probes it made."""
    trial = next(
        one
        for one in workshop.plan().trials
        if one.batch_size == batch_size and one.method.name == "lora"
    )
    engine = workshop.engine([trial], remark=print)
    began, probes = time.perf_counter(), 0
    for event in engine.train(ListFeed([trial])):
        assert not isinstance(event, Failed), event
        probes += isinstance(event, NoiseProbe)
    return time.perf_counter() - began, probes


def studied(batch_size: int, *, rows: int, every: int | None, held_out: int | None) -> LoadedStudy:
    """The demo's study with one batch size, with or without probes."""
    loaded = demo_study()
    fields = loaded.study.model_dump(exclude_unset=True)
    fields |= {"batch_size": batch_size, "seeds": 1, "learning_rate": [6e-3], "methods": ["lora"]}
    fields["data"] = {**fields["data"], "rows": rows}
    if every is not None:
        fields["noise_scale"] = {"every": every, "held_out": held_out}
    study = type(loaded.study).model_validate(fields)
    return replace(loaded, study=study)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What noise probes cost.")
    parser.add_argument("--engine", choices=["reference", "packed"], default="reference")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=None)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    choice: EngineChoice = asked.engine
    device = choose_device("cpu")
    for batch_size in asked.batch:
        loaded = [
            studied(batch_size, rows=asked.rows, every=every, held_out=asked.held_out)
            for every in (None, asked.every)
        ]
        workshops = [LocalWorkshop(one, device, engine_choice=choice) for one in loaded]
        for one, shop in zip(loaded, workshops, strict=True):
            seconds(one, shop, batch_size)  # What is loaded once is loaded now.
        ratios, probes = list[float](), 0
        for pair in range(asked.pairs):
            took = [0.0, 0.0]
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                took[which], count = seconds(loaded[which], workshops[which], batch_size)
                probes = max(probes, count)
            ratios.append(took[1] / took[0])
        print(
            json.dumps(
                {
                    "engine": asked.engine,
                    "batch_size": batch_size,
                    "probes": probes,
                    "held_out": asked.held_out,
                    "ratio": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()

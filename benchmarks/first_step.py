"""Seconds from the start of a process to the first update of a pack.

    python benchmarks/first_step.py --shapes 135m,7b

Two processes a shape, one after the other: the first with empty caches of torch's and Triton's
compilers, the second with what the first left. Each imports, makes a random model and rows on the
device, and trains as many trials as fill a step, through `engine.train(feed)`, until the first has
made an update. What it does not cover: reading a model and data from disk, and planning a study.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import psutil
import torch

from many_adapters import packed, packed_engine
from measure import synchronise
from model_shapes import SHAPES
from random_model import random_base
from random_rows import equal_rows, long_trial

IMPORTED = time.time()
RANK = 16


@dataclass(frozen=True, slots=True)
class FirstStep:
    """Seconds since the operating system made the process."""

    imports: float
    engine: float
    first_update: float


def first_step(name: str, *, batch_size: int, device: torch.device) -> FirstStep:
    """In this process."""
    began = psutil.Process().create_time()
    shape = SHAPES[name]
    base, data = random_base(shape, device=device), equal_rows(shape)
    num_trials = max(2, shape.tokens_per_step // (shape.row_tokens * batch_size))
    trials = [
        long_trial(data, slot=slot, batch_size=batch_size, rank=RANK) for slot in range(num_trials)
    ]
    synchronise(device)
    ready = time.time()
    engine = packed_engine(
        base,
        data,
        num_slots=num_trials,
        tokens_per_step=shape.tokens_per_step,
        rank=RANK,
        method="lora",
    )
    with packed(engine, data, trials) as advance:
        advance()
        synchronise(device)
    return FirstStep(IMPORTED - began, ready - began, time.time() - began)


def in_new_process(name: str, *, options: argparse.Namespace, caches: Path) -> FirstStep:
    """A process of its own, whose compilers cache in the folder."""
    command = [sys.executable, __file__, "--one", name, "--device", options.device]
    command += ["--batch-size", str(options.batch_size)]
    folders = {name: str(caches / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    done = subprocess.run(
        command, env={**os.environ, **folders}, stdout=subprocess.PIPE, text=True, check=True
    )
    return FirstStep(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="7b,1b,0.6b,135m")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        device = torch.device(options.device)
        found = first_step(options.one, batch_size=options.batch_size, device=device)
        print(json.dumps(asdict(found)))
        return 0
    print("| shape | caches | imports s | model and rows s | first update s |")
    print("|---|---|---|---|---|")
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as caches:
            for state in ("empty", "full"):
                one = in_new_process(name, options=options, caches=Path(caches))
                print(
                    f"| {name} | {state} | {one.imports:.1f} | {one.engine:.1f} | "
                    f"{one.first_update:.1f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

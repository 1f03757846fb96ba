"""Random packs, planned for random parts of the device's memory, and what they then take.

    python benchmarks/random_packs.py --json packs.json --minutes 9     # again, to go on
    python benchmarks/random_packs.py --json second.json --part 2/2     # beside 1/2 elsewhere
    python benchmarks/random_packs.py --json packs.json --join second.json
    python benchmarks/random_packs.py --json probed.json --probed --steps 4 --packs 24

Every pack draws its trials (methods, batch sizes, ranks, dropout, rows), whether blocks are
checkpointed, and how much memory there is; the planner chooses its shape as for `loratune run`; the
allocator is held to that memory, so that what does not fit is an out-of-memory; the trials make a
few updates through `engine.train(feed)`. With `--probed` the noise scale is measured at every
second one. Pack number n is the same at every call. Exit code 0: all
packs trained and none ran out of memory; 1: some did, or broke; 3: not all are done yet.

One base for all packs. Every shape of a pack compiles and captures a step of its own, as it does in
a sweep: what a pack takes without them is something else. That is most of the time.

What it does not cover: validation and generation, quantised bases, several devices.
"""

import argparse
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch

from kept_results import KeptResults, Minutes
from loratune.data.prepare import PreparedData
from loratune.engine.base import Failed, Finished, Progress
from loratune.engine.packed import PackedEngine
from loratune.models.load import Base
from loratune.planning.pack_shape import SHARE_OF_MEMORY, pack_bytes, plan_pack
from loratune.planning.packing import PackShape
from loratune.records import NoiseProbe, NoiseSchedule, Trial
from loratune.study.methods import choose
from loratune.workshop import choose_device
from many_adapters import ListFeed
from measure import release_memory
from model_shapes import SHAPES, TARGETS, Shape
from random_model import random_base
from random_rows import equal_rows, gsm8k_like_rows, long_trial

# PiSSA by its fast decomposition: the exact one takes longer than all else, for the same memory.
METHODS = ("lora", "rslora", "loraplus", "olora", "pissa", "dora")
OPTIONS: Mapping[str, Mapping[str, int]] = {"pissa": {"niter": 2}}
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
RANKS = (4, 8, 16, 64)
# Rows of a quarter, the whole and twice the shape's usual length, and of many lengths.
ROWS: Mapping[str, Callable[[Shape], PreparedData]] = {
    "short": lambda shape: equal_rows(replace(shape, row_tokens=shape.row_tokens // 4)),
    "equal": equal_rows,
    "long": lambda shape: equal_rows(replace(shape, row_tokens=2 * shape.row_tokens)),
    "gsm8k": gsm8k_like_rows,
}
# The smallest part of the device that is drawn; a pack that cannot fit is drawn anew with more.
SMALLEST_PART = 0.04
# Planned and measured memory are to differ by no more.
GOAL = 0.05
# With probes, so that packs have probed steps and replayed ones.
NOISE = NoiseSchedule(every=2, rows=32, held_out_rows=None)


@dataclass(frozen=True)
class Draw:
    """One random pack."""

    number: int
    rows: str
    trials: tuple[Trial, ...]
    gradient_checkpointing: bool
    memory_bytes: int
    shape: PackShape
    planned_bytes: int

    def facts(self) -> dict[str, Any]:
        """What is kept of it."""
        return {
            "rows": self.rows,
            "num_trials": len(self.trials),
            "methods": sorted({trial.method.name for trial in self.trials}),
            "batch_sizes": sorted({trial.batch_size for trial in self.trials}),
            "memory_bytes": self.memory_bytes,
            "planned_bytes": self.planned_bytes,
            "shape": asdict(self.shape),
        }


@dataclass
class Bench:
    """One base, the row sets, and the memory there is."""

    shape: Shape
    base: Base
    data: Mapping[str, PreparedData]
    total_bytes: int
    steps: int
    most_trials: int
    seed: int
    probed: bool = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.base.device

    @property
    def precision(self) -> str:
        """Of the base."""
        return str(self.base.model.dtype).removeprefix("torch.")

    def draw(self, number: int) -> Draw:
        """Pack number `number`, whatever was drawn before."""
        generator = np.random.default_rng([self.seed, number])

        def pick(values: Sequence[Any]) -> Any:
            return values[int(generator.integers(len(values)))]

        rows = pick(list(self.data))
        num_trials = int(generator.integers(1, self.most_trials + 1))
        few = [pick(METHODS) for _ in range(int(generator.integers(1, 4)))]
        most_rank, largest_batch = pick(RANKS), pick(BATCH_SIZES)
        dropout = pick((0.0, 0.0, 0.1))
        checkpointing = pick((False, False, False, True))
        trials = list[Trial]()
        for slot in range(num_trials):
            method = few[slot % len(few)]
            trial = long_trial(
                self.data[rows],
                slot=slot,
                batch_size=pick([size for size in BATCH_SIZES if size <= largest_batch]),
                rank=pick([rank for rank in RANKS if rank <= most_rank]),
                method=method,
                steps=self.steps,
            )
            chosen = choose(method, dict(OPTIONS.get(method, {})))
            trials.append(
                replace(
                    trial,
                    trial_id=f"pack-{number}-trial-{slot}",
                    method=chosen,
                    precision=self.precision,
                    dropout=dropout if slot % 2 == 0 else 0.0,
                )
            )
        part = float(np.exp(generator.uniform(np.log(SMALLEST_PART), np.log(0.95))))
        while True:
            memory = int(part * self.total_bytes)
            shape = plan_pack(
                trials,
                model=self.shape.facts,
                data=[self.data[rows].facts],
                memory_bytes=memory,
                gradient_checkpointing=checkpointing,
                probed=self.probed,
            )
            planned = pack_bytes(
                shape, model=self.shape.facts, precision=self.precision, targets=TARGETS
            )
            if planned <= SHARE_OF_MEMORY * memory or part >= 1:
                return Draw(number, rows, tuple(trials), checkpointing, memory, shape, planned)
            part = min(1.0, 1.25 * part)

    def train(self, draw: Draw) -> dict[str, Any]:
        """Train the pack; what it took, and how it went."""
        on_cuda = self.device.type == "cuda"
        release_memory(self.device)
        if on_cuda:
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, draw.memory_bytes / self.total_bytes), self.device
            )
        before = self._allocator()
        left = torch.cuda.memory_reserved(self.device) if on_cuda else None
        data = self.data[draw.rows]
        engine = PackedEngine(
            self.base,
            {data.facts.fingerprint: data},
            shape=draw.shape,
            targets=TARGETS,
            noise=NOISE if self.probed else None,
        )
        since, error = time.perf_counter(), None
        num_updates, num_probes, statuses = 0, 0, dict[str, int]()
        try:
            with closing(engine.train(ListFeed(draw.trials))) as events:
                for event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Progress):
                        num_updates += 1
                    if isinstance(event, NoiseProbe):
                        num_probes += 1
                    if isinstance(event, Finished):
                        status = event.outcome.status
                        statuses[status] = statuses.get(status, 0) + 1
        except Exception as raised:  # noqa: BLE001  # one broken pack must not cost the others
            traceback.print_exc()
            error = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        seconds = time.perf_counter() - since
        reserved = torch.cuda.max_memory_reserved(self.device) if on_cuda else None
        allocated = torch.cuda.max_memory_allocated(self.device) if on_cuda else None
        after = self._allocator()
        return {
            **draw.facts(),
            "statuses": statuses,
            "num_updates": num_updates,
            "num_probes": num_probes,
            "seconds": seconds,
            "reserved_before_bytes": left,
            "reserved_bytes": reserved,
            "allocated_bytes": allocated,
            "num_out_of_memory": after["num_ooms"] - before["num_ooms"],
            "num_retries": after["num_alloc_retries"] - before["num_alloc_retries"],
            "was_shrunk": engine.shape != draw.shape,
            "final_shape": asdict(engine.shape),
            "error": error,
        }

    def _allocator(self) -> dict[str, int]:
        """How often the allocator gave up, and how often it first gave back what it had cached."""
        names = ("num_ooms", "num_alloc_retries")
        if self.device.type != "cuda":
            return dict.fromkeys(names, 0)
        stats = torch.cuda.memory_stats(self.device)
        return {name: int(stats.get(name, 0)) for name in names}


# ---------------------------------------------------------------------------- the table


def is_bad(result: Mapping[str, Any]) -> bool:
    """Whether a pack ran out of memory, was made smaller, or broke."""
    return bool(
        result["num_out_of_memory"]
        or result["was_shrunk"]
        or result["error"]
        or result["statuses"].get("out_of_memory")
    )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Counts, and planned over measured memory, of all packs and of those of a kind."""
    kinds: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "all": lambda one: True,
        "lora alone": lambda one: (
            not any(
                one["shape"][name]
                for name in ("corrected", "magnitudes", "dropout", "gradient_checkpointing")
            )
        ),
        "with a part taken out of the base": lambda one: one["shape"]["corrected"],
        "with dora": lambda one: one["shape"]["magnitudes"],
        "with dropout": lambda one: one["shape"]["dropout"],
        "checkpointed": lambda one: one["shape"]["gradient_checkpointing"],
        "planned above 85% of the memory": lambda one: (
            one["planned_bytes"] > 0.85 * one["memory_bytes"]
        ),
    }
    columns = (
        "packs",
        "number",
        "out of memory",
        "shrunk",
        "broken",
        "retries",
        "planned / reserved: least, 5%, median, 95%, most",
        "within 5%",
        "planned / allocated: median",
    )
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for name, belongs in kinds.items():
        chosen = [one for one in results if belongs(one)]
        measured = [one for one in chosen if one["reserved_bytes"] and not is_bad(one)]
        ratios = [one["planned_bytes"] / one["reserved_bytes"] for one in measured]
        allocated = [one["planned_bytes"] / one["allocated_bytes"] for one in measured]
        spread = np.quantile(ratios, [0, 0.05, 0.5, 0.95, 1]) if ratios else []
        within = sum(abs(1 / ratio - 1) <= GOAL for ratio in ratios)
        cells = [
            name,
            len(chosen),
            sum(bool(one["num_out_of_memory"]) for one in chosen),
            sum(one["was_shrunk"] for one in chosen),
            sum(one["error"] is not None for one in chosen),
            sum(one["num_retries"] for one in chosen),
            ", ".join(f"{one:.3f}" for one in spread) or "not measured",
            f"{within} of {len(ratios)}",
            f"{np.median(allocated):.3f}" if allocated else "",
        ]
        lines.append(" | ".join(map(str, cells)))
    return "\n".join(f"| {line} |" for line in lines)


# ---------------------------------------------------------------------------- command line


def _part(text: str) -> tuple[int, int]:
    """`2/3` as numbers."""
    which, parts = map(int, text.split("/"))
    if not 1 <= which <= parts:
        raise ValueError(text)
    return which, parts


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packs", type=int, default=100)
    parser.add_argument("--shape", choices=list(SHAPES), help="default: 135m, on a CPU tiny")
    parser.add_argument("--layers", type=int, help="of the model; default: the shape's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2, help="updates of a trial")
    parser.add_argument("--most-trials", type=int, default=32, help="in a pack")
    parser.add_argument("--probed", action="store_true", help="measure the noise scale")
    parser.add_argument("--minutes", type=float, help="start no pack that may end later")
    parser.add_argument("--json", type=Path, help="write results here, and go on from it")
    parser.add_argument("--part", type=_part, default=(1, 1), help="2/3: every third, from the 2nd")
    parser.add_argument(
        "--join", type=Path, nargs="+", default=[], help="take other parts' results"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    return parser.parse_args(arguments)


def make_bench(options: argparse.Namespace) -> Bench:
    """The base and the rows."""
    device = choose_device(options.device)
    on_cuda = device.type == "cuda"
    shape = SHAPES[options.shape or ("135m" if on_cuda else "tiny")]
    if options.layers is not None:
        shape = replace(shape, num_layers=options.layers)
    return Bench(
        shape=shape,
        base=random_base(shape, device=device),
        data={name: make(shape) for name, make in ROWS.items()},
        # A CPU's memory is not counted: there is as much as an H100 has.
        total_bytes=(
            torch.cuda.get_device_properties(device).total_memory if on_cuda else 80 * 2**30
        ),
        steps=options.steps,
        most_trials=options.most_trials,
        seed=options.seed,
        probed=options.probed,
    )


def main(arguments: Sequence[str]) -> int:
    """Train, print, write."""
    options = parse(arguments)
    minutes = Minutes(options.minutes)
    bench = make_bench(options)
    on_cuda = bench.device.type == "cuda"
    settings = {
        "shape": bench.shape.name,
        "layers": bench.shape.num_layers,
        "device": torch.cuda.get_device_name(bench.device) if on_cuda else platform.machine(),
        **{name: getattr(options, name) for name in ("seed", "steps", "most_trials", "probed")},
    }
    about = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "total_bytes": bench.total_bytes,
    }
    kept = KeptResults(options.json, settings=settings, about=about)
    for path in options.join:
        for number, result in KeptResults(path, settings=settings, about={}).results.items():
            kept.add(number, result)
    which, parts = options.part
    for number in range(which - 1, options.packs, parts):
        if str(number) in kept:
            continue
        if not minutes.allow("pack"):
            break
        since = time.perf_counter()
        result = bench.train(bench.draw(number))
        minutes.took("pack", time.perf_counter() - since)
        kept.add(str(number), result)
        ratio = result["reserved_bytes"] and result["planned_bytes"] / result["reserved_bytes"]
        print(
            f"pack {number}: {result['num_trials']} trials, {result['shape']}, "
            f"planned / reserved {ratio}, {result['seconds']:.1f} s, bad: {is_bad(result)}",
            file=sys.stderr,
            flush=True,
        )
    results = [kept.results[str(one)] for one in range(options.packs) if str(one) in kept]
    print(table(results))
    seconds = sum(one["seconds"] for one in results)
    how = "each compiled and captured" if on_cuda else "on a CPU, where memory is not measured"
    print(f"{len(results)} of {options.packs} packs in {seconds:.0f} s, {how}")
    if any(is_bad(one) for one in results):
        return 1
    return 0 if len(results) == options.packs else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

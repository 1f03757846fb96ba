"""The attention kernels of packed training over block sizes, warps and stages, on one CUDA device.

    python benchmarks/attention_launches.py --json launches.json

Every pass (forward, the queries' gradient, the keys' gradient; and where it fits the one pass that
makes all gradients of rows in one block) is timed alone in a CUDA graph, for the heads of each
shape, over rows of 256 tokens and over rows as long as GSM8K's. A launch that does not fit, or
whose numbers are not those of today's table, is left out. The table names, by width of a head and
pass, the launch with the least sum of time over the fastest's, and today's.

What it does not cover: widths other than 64 and 128, sliding windows, float32, smaller cards.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from torch import Tensor

from model_shapes import SHAPES, Shape
from random_rows import gsm8k_like_rows

# Blocks of queries and of keys, warps, stages.
Sizes = tuple[int, int, int, int]
TABLES = {
    "forward": "FORWARD",
    "queries": "BACKWARD_QUERIES",
    "keys": "BACKWARD_KEYS",
}
# A pass of its own only where a row is no longer than its block of keys.
WHOLE = "whole"
# Launches only change the order of sums.
TOLERANCE = 0.02


def candidates(width: int) -> dict[str, list[Sizes]]:
    """What is tried for each pass."""
    few = (4, 8)
    found = {
        "forward": list(product((64, 128), (32, 64, 128), few, (2, 3, 4))),
        "queries": list(product((64, 128), (32, 64, 128), few, (1, 2, 3))),
        "keys": list(product((32, 64, 128), (64, 128), few, (1, 2, 3))),
        WHOLE: list(product((16, 32, 64), (256,), (8, 16), (1, 2))),
    }
    if width > 64:  # Two accumulators of 256 keys fill the registers.
        found[WHOLE] = []
    return found


def chosen(times: Mapping[tuple[str, str, Sizes], float]) -> Sizes:
    """The launch with the least sum of time over the fastest's, over {(shape, rows, launch): us}.

    Raises:
        ValueError: no launch was timed everywhere.
    """
    places = {(shape, rows) for shape, rows, _ in times}
    fastest = {
        place: min(time for (*where, _), time in times.items() if tuple(where) == place)
        for place in places
    }

    def slowness(sizes: Sizes) -> float:
        return sum(times.get((*place, sizes), math.inf) / fastest[place] for place in places)

    best = min((sizes for _, _, sizes in times), key=slowness)
    if not math.isfinite(slowness(best)):
        raise ValueError("no launch was timed everywhere")
    return best


@dataclass
class Heads:
    """Random queries, keys, values and gradients of one layer, and the forward's results."""

    width: int
    tensors: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    bounds: Tensor
    longest: int
    out: Tensor
    sums: Tensor


def heads_of(shape: Shape, lengths: Sequence[int], device: torch.device) -> Heads:
    """The heads of a shape over rows end to end."""
    from loratune.engine.attention_kernels import attention_forward

    num_tokens, width = sum(lengths), shape.head_dim
    generator = torch.Generator(device).manual_seed(0)

    def made(num_heads: int) -> Tensor:
        sizes = (num_tokens, num_heads, width)
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v = (
        made(shape.num_heads),
        made(shape.num_key_value_heads),
        made(shape.num_key_value_heads),
    )
    bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
    out, sums = attention_forward(
        q, k, v, bounds, longest_row=max(lengths), scale=width**-0.5, window=None
    )
    return Heads(width, (q, k, v), made(shape.num_heads), bounds, max(lengths), out, sums)


def call_of(heads: Heads, what: str, sizes: Sizes) -> Callable[[], tuple[Tensor, ...]]:
    """One pass with this launch; a gradient's pass with today's launch of the other."""
    from loratune.engine import attention_kernels as kernels

    launch, width = kernels.Launch(*sizes), heads.width
    given = {"longest_row": heads.longest, "scale": width**-0.5, "window": None}
    if what == "forward":
        return lambda: kernels.attention_forward(
            *heads.tensors, heads.bounds, launch=launch, **given
        )
    launches = {
        "queries": (launch, kernels.BACKWARD_KEYS[width]),
        "keys": (kernels.BACKWARD_QUERIES[width], launch),
        WHOLE: (None, launch),
    }[what]
    return lambda: kernels.attention_backward(
        heads.grad,
        *heads.tensors,
        heads.out,
        heads.sums,
        heads.bounds,
        launches=launches,
        **given,
    )


def microseconds(heads: Heads, what: str, sizes: Sizes, expected: Sequence[Tensor]) -> float | None:
    """None: it does not fit, or its numbers are others."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph

    call = call_of(heads, what, sizes)
    try:
        results = call()
    except OutOfResources:
        return None
    for one, wanted in zip(results, expected, strict=False):
        if not float((one - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max()):
            print(f"{what} {sizes}: other numbers than today's", file=sys.stderr)
            return None
    return 1e3 * float(do_bench_cudagraph(call, rep=10))


def todays(what: str, width: int) -> Sizes:
    """The launch in the table."""
    from loratune.engine import attention_kernels as kernels

    return tuple(getattr(kernels, TABLES[what])[width])


def measure(names: Iterable[str], device: torch.device) -> list[tuple[str, str, str, Sizes, float]]:
    """(shape, rows, pass, launch, us) of all that fits."""
    found = list[tuple[str, str, str, Sizes, float]]()
    for name in names:
        shape = SHAPES[name]
        lengths = {
            "equal": [shape.row_tokens] * (shape.tokens_per_step // shape.row_tokens),
            "gsm8k": gsm8k_like_rows(shape, num_rows=100).train.lengths.tolist(),
        }
        for rows, of_rows in lengths.items():
            heads = heads_of(shape, of_rows, device)
            backward = call_of(heads, "keys", todays("keys", shape.head_dim))()
            for what, tried in candidates(shape.head_dim).items():
                if what == WHOLE and rows != "equal":
                    continue
                expected = (heads.out,) if what == "forward" else backward
                for sizes in tried:
                    time = microseconds(heads, what, sizes, expected)
                    if time is not None:
                        found.append((name, rows, what, sizes, time))
            print(f"{name}, {rows}: {len(found)} timed", file=sys.stderr, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["135m", "1b", "0.6b", "7b"])
    parser.add_argument("--json", type=Path, help="write every time here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("the kernels need a CUDA device, and there is none")
    found = measure(options.shapes, torch.device("cuda"))
    if options.json is not None:
        options.json.write_text(json.dumps(found), encoding="utf-8")
    print("| width | pass | shape, rows | today's, us | chosen | us |\n|---|---|---|---|---|---|")
    for width, what in product((64, 128), (*TABLES, WHOLE)):
        times = {
            (name, rows, sizes): time
            for name, rows, which, sizes, time in found
            if which == what and SHAPES[name].head_dim == width
        }
        if not times:
            continue
        best = chosen(times)
        for name, rows in dict.fromkeys((name, rows) for name, rows, _ in times):
            # The one pass stands for both of today's, and the last of them times both.
            now = times.get((name, rows, todays(what, width))) if what in TABLES else None
            before = "" if now is None else f"{now:.0f}"
            took = f"{times[name, rows, best]:.0f}"
            print(f"| {width} | {what} | {name}, {rows} | {before} | {best} | {took} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

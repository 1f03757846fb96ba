"""Seconds on a device: warm-up, synchronise, the median of a few windows, memory in between.

What is timed is a function that makes one update of every adapter there is and says how many rows
and tokens that took. This file knows nothing of models.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Advance = Callable[[], tuple[int, int]]

# The first makes or compiles, the second may compile again for lengths that vary, the third tells
# how long one takes.
NUM_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over windows; `slowest` and `fastest` are the extremes of rows a second.

    `first_seconds` is how long the first update took, since `begun` where that was given.
    """

    rows_per_second: float
    tokens_per_second: float
    slowest: float
    fastest: float
    seconds: float
    num_updates: int
    first_seconds: float


def time_updates(
    advance: Advance,
    *,
    device: torch.device,
    seconds: float,
    num_windows: int = 5,
    begun: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """The speed of `advance` over about `seconds`, in windows that begin and end synchronised."""
    begun = clock() if begun is None else begun
    first_seconds = last = 0.0
    for number in range(NUM_WARM_UPS):
        since = clock()
        advance()
        synchronise(device)
        last = clock() - since
        if number == 0:
            first_seconds = clock() - begun
    per_window = max(1, round(seconds / num_windows / max(last, 1e-6)))
    rows_per_second, tokens_per_second = list[float](), list[float]()
    total = 0.0
    while len(rows_per_second) < num_windows:
        since = clock()
        amounts = [advance() for _ in range(per_window)]
        synchronise(device)
        spent = clock() - since
        rows_per_second.append(sum(rows for rows, _ in amounts) / spent)
        tokens_per_second.append(sum(tokens for _, tokens in amounts) / spent)
        total += spent
        # Slow updates: two windows say something, five would say it for half a minute.
        if total > seconds and len(rows_per_second) >= 2:
            break
    return Speed(
        rows_per_second=statistics.median(rows_per_second),
        tokens_per_second=statistics.median(tokens_per_second),
        slowest=min(rows_per_second),
        fastest=max(rows_per_second),
        seconds=total,
        num_updates=per_window * len(rows_per_second),
        first_seconds=first_seconds,
    )


def matmul_flops_per_second(size: int, *, device: torch.device, seconds: float) -> float:
    """A bfloat16 product of two [size, size] matrices: what arithmetic can reach at most."""
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    right = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(left)

    def advance() -> tuple[int, int]:
        torch.matmul(left, right, out=out)
        return 1, 1

    return 2 * size**3 * time_updates(advance, device=device, seconds=seconds).rows_per_second


def copy_bytes_per_second(num_bytes: int, *, device: torch.device, seconds: float) -> float:
    """Bytes read and written by a copy on the device: what memory can reach at most."""
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def advance() -> tuple[int, int]:
        target.copy_(source)
        return 1, 1

    return 2 * num_bytes * time_updates(advance, device=device, seconds=seconds).rows_per_second


def synchronise(device: torch.device) -> None:
    """Wait for everything that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back what nobody holds, compiled code included, and count the peak anew."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most that was taken from the device since `release_memory`; None on a CPU.

    Not what tensors held: a captured step keeps its memory when its tensors are gone.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None

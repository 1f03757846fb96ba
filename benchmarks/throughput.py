"""Training throughput on one device: one adapter at a time, and many, beside each other.

    python benchmarks/throughput.py --shapes 135m,7b --only matmul,peft,compiled,packed \
        --json results.json

All in one process over one base model a shape. What each row is stands in docs/benchmarks.md. A
case that fails is recorded with its reason and the others go on. Not covered: several devices,
gradient checkpointing, evaluation.
"""

import argparse
import json
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from torch.profiler import ProfilerActivity, profile

from loratune.data.prepare import PreparedData
from loratune.models.load import Base
from loratune.planning.cost import H100, flops_per_token, trial_cost
from loratune.planning.packing import PackShape
from loratune.planning.targets import matched_linears
from many_adapters import packed, packed_engine, planned_memory_bytes
from measure import (
    NUM_WARM_UPS,
    Advance,
    Speed,
    copy_bytes_per_second,
    matmul_flops_per_second,
    peak_memory_bytes,
    release_memory,
    synchronise,
    time_updates,
)
from model_shapes import SHAPES, TARGETS, Shape
from one_adapter import peft_compiled, peft_eager
from random_model import random_base
from random_rows import equal_rows, gsm8k_like_rows, long_trial, mean_gsm8k_tokens

SECTIONS = (
    "matmul",
    "peft",
    "compiled",
    "packed",
    "lengths",
    "rank",
    "dora",
    "memory",
    "first-step",
)
PEFT, BFLOAT16, FLOAT32, PACKED = "peft", "compiled-bfloat16", "compiled-float32", "packed"
RANK = 16
MOST_ADAPTERS = 128
FEWEST_ADAPTERS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table. `rows` says how long rows are; `cold`: compiled code is not reused."""

    what: str
    shape: str
    num_adapters: int = 1
    batch_size: int = 1
    rank: int = RANK
    method: str = "lora"
    rows: str = "equal"
    cold: bool = False
    precision: str = "bfloat16"

    @property
    def key(self) -> str:
        """What `--resume` knows it by."""
        return "/".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


@dataclass(frozen=True, slots=True)
class Result:
    """What one case came to; None where it does not apply, `error` where it failed."""

    case: Case
    device: str
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    slowest_rows_per_second: float | None = None
    fastest_rows_per_second: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    peak_memory_bytes: int | None = None
    planned_memory_bytes: int | None = None
    first_step_seconds: float | None = None
    seconds_measured: float | None = None
    num_updates: int | None = None
    rows_per_microbatch: int | None = None
    tokens_per_step: int | None = None
    num_slots: int | None = None
    error: str | None = None


def cases_of(shape: Shape, options: argparse.Namespace) -> list[Case]:
    """The cases of one shape in the order of the sections; what two sections share comes once."""
    sizes = list(options.batch_sizes or shape.batch_sizes)
    middle = 4 if 4 in sizes else sizes[-1]
    large = 16 if 16 in sizes else sizes[-1]

    def single(what: str, batch_size: int, **changes: Any) -> Case:
        return Case(what, shape.name, 1, batch_size, precision=options.precision, **changes)

    def pack(
        batch_size: int, *, most: int = MOST_ADAPTERS, rows: str = "equal", **changes: Any
    ) -> Case:
        num = options.adapters or _num_adapters(shape, batch_size, options, rows=rows)
        return Case(
            PACKED,
            shape.name,
            min(num, most),
            batch_size,
            rows=rows,
            precision=options.precision,
            **changes,
        )

    # At rank 128 the optimizer alone takes 5 GiB an adapter of the 7b shape.
    few = 4 if shape.name == "7b" else 32
    by_section: dict[str, list[Case]] = {
        "matmul": [],
        "peft": [single(PEFT, size) for size in sizes],
        "compiled": [single(BFLOAT16, size) for size in sizes] + [single(FLOAT32, large)],
        "packed": [pack(size) for size in sizes],
        "lengths": [
            case
            for size in dict.fromkeys((middle, large))
            for case in (
                single(PEFT, size, rows="gsm8k"),
                single(BFLOAT16, size, rows="gsm8k"),
                pack(size, rows="gsm8k"),
            )
        ],
        "rank": [
            case
            for rank in (RANK, 128)
            for case in (single(PEFT, middle, rank=rank), pack(middle, most=few, rank=rank))
        ],
        "dora": [
            single(PEFT, middle),
            pack(middle, most=few),
            single(PEFT, middle, method="dora"),
            pack(middle, most=few, method="dora"),
        ],
        "memory": [single(PEFT, large), pack(large)],
        "first-step": [single(BFLOAT16, middle, cold=True), pack(middle, cold=True)],
    }
    chosen = [case for name in SECTIONS if name in options.only for case in by_section[name]]
    return list(dict.fromkeys(chosen))


def _num_adapters(
    shape: Shape, batch_size: int, options: argparse.Namespace, *, rows: str = "equal"
) -> int:
    """As many adapters as fill a step with one batch each, within reason.

    Where lengths vary a quarter more: whoever does not fit into a step comes first in the next.
    """
    tokens = options.tokens_per_step or shape.tokens_per_step
    row_tokens = shape.row_tokens if rows == "equal" else mean_gsm8k_tokens() / 1.25
    full = int(tokens / (row_tokens * batch_size))
    return max(FEWEST_ADAPTERS, min(MOST_ADAPTERS, full))


class Bench:
    """One base at a time, and the rows for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.device_name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
        )
        self._shape: Shape | None = None
        self._base: Base | None = None
        self._data = dict[str, PreparedData]()
        self._pack: PackShape | None = None

    def measure(self, case: Case) -> Result:
        """One case. Out of memory or broken is a result too."""
        error: str
        try:
            if case.what == "matmul":
                return self._matmul(case)
            if case.what == "copy":
                return self._copy(case)
            return self._train(case)
        except torch.OutOfMemoryError as raised:
            error = f"out of memory: {str(raised).splitlines()[0]}"
        except Exception as raised:  # noqa: BLE001  # one broken case must not cost the others
            traceback.print_exc()
            error = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        finally:
            release_memory(self.device)
        return Result(case, self.device_name, error=error)

    def profile(self, case: Case, path: Path, *, num_updates: int) -> None:
        """Where the time of a few updates goes, kernel by kernel."""
        on_cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        with self._advance(case, rows_per_microbatch=case.batch_size) as advance:
            for _ in range(NUM_WARM_UPS):
                advance()
            synchronise(self.device)
            with profile(activities=activities) as profiled:
                since = time.perf_counter()
                num_rows = sum(advance()[0] for _ in range(num_updates))
                synchronise(self.device)
                seconds = time.perf_counter() - since
        averages = profiled.key_averages()
        column = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        # On a GPU operators repeat the time of the kernels that they launch: only those count.
        kernels = [one for one in averages if not on_cuda or str(one.device_type).endswith("CUDA")]
        busy = sum(getattr(one, column) for one in kernels) / 1e6
        lines = [
            case.key,
            f"{self.device_name}: {num_updates} updates, {num_rows} rows in {seconds:.3f} s; "
            f"kernels {busy:.3f} s ({busy / seconds:.0%})",
            f"{'ms':>10} {'share':>7} {'calls':>7}  name",
        ]
        for one in sorted(kernels, key=lambda one: -getattr(one, column))[:40]:
            spent = getattr(one, column) / 1e6
            lines.append(f"{spent * 1e3:10.2f} {spent / busy:7.1%} {one.count:7d}  {one.key[:140]}")
        operators = averages.table(sort_by=column, row_limit=40, max_name_column_width=90)
        path.write_text("\n".join([*lines, "", operators]), encoding="utf-8")

    def _matmul(self, case: Case) -> Result:
        size = 8192 if self.device.type == "cuda" else 256
        rate = matmul_flops_per_second(size, device=self.device, seconds=self.options.seconds / 2)
        return Result(case, self.device_name, flops_per_second=rate)

    def _copy(self, case: Case) -> Result:
        num_bytes = 2**31 if self.device.type == "cuda" else 2**24
        rate = copy_bytes_per_second(
            num_bytes, device=self.device, seconds=self.options.seconds / 2
        )
        return Result(case, self.device_name, bytes_per_second=rate)

    def _train(self, case: Case) -> Result:
        """Times a case; one adapter at a time, a batch that does not fit is cut in halves."""
        rows = case.batch_size
        while True:
            self._rows(case)  # rows and base are made before the clock starts
            release_memory(self.device)
            try:
                return self._timed(case, rows_per_microbatch=rows)
            except torch.OutOfMemoryError:
                if rows == 1 or case.what == PACKED:
                    raise
            # Outside the except block: the error holds on to what was allocated.
            rows = (rows + 1) // 2

    def _timed(self, case: Case, *, rows_per_microbatch: int) -> Result:
        data = self._rows(case)
        with _no_compiled_code() if case.cold else nullcontext():
            begun = time.perf_counter()
            with self._advance(case, rows_per_microbatch=rows_per_microbatch) as advance:
                speed = time_updates(
                    advance, device=self.device, seconds=self.options.seconds, begun=begun
                )
        return self._result(case, data, speed, rows_per_microbatch=rows_per_microbatch)

    def _result(
        self, case: Case, data: PreparedData, speed: Speed, *, rows_per_microbatch: int
    ) -> Result:
        shape = SHAPES[case.shape]
        facts = data.facts
        a_token = flops_per_token(
            shape.facts,
            rank=case.rank,
            targets=matched_linears(shape.facts, TARGETS),
            mean_attended_tokens=facts.sum_squared_tokens / facts.num_tokens,
            target_share=facts.num_target_tokens / facts.num_tokens,
        )
        # What was allocated in the end: out of memory, the engine goes on in a smaller pack.
        pack = self._pack if case.what == PACKED else None
        return Result(
            case,
            self.device_name,
            rows_per_second=speed.rows_per_second,
            tokens_per_second=speed.tokens_per_second,
            slowest_rows_per_second=speed.slowest,
            fastest_rows_per_second=speed.fastest,
            flops_per_second=speed.tokens_per_second * a_token,
            peak_memory_bytes=peak_memory_bytes(self.device),
            planned_memory_bytes=(
                planned_memory_bytes(pack, shape.facts, case.precision)
                if pack is not None
                else self._planned_alone(case, data, rows_per_microbatch=rows_per_microbatch)
            ),
            first_step_seconds=speed.first_seconds,
            seconds_measured=speed.seconds,
            num_updates=speed.num_updates,
            rows_per_microbatch=None if pack is not None else rows_per_microbatch,
            tokens_per_step=None if pack is None else pack.tokens_per_step,
            num_slots=None if pack is None else pack.num_slots,
        )

    def _planned_alone(
        self, case: Case, data: PreparedData, *, rows_per_microbatch: int
    ) -> int | None:
        if case.what != PEFT:
            return None
        trial = replace(self._trial(case, data, slot=0), precision=case.precision)
        return trial_cost(
            trial,
            model=SHAPES[case.shape].facts,
            data=data.facts,
            rate=replace(H100, memory_bytes=None),
            tokens_per_microbatch=rows_per_microbatch * data.facts.max_row_tokens,
        ).peak_memory_bytes

    @contextmanager
    def _advance(self, case: Case, *, rows_per_microbatch: int) -> Generator[Advance]:
        data = self._rows(case)
        base = self._base_of(SHAPES[case.shape])
        with ExitStack() as stack:
            if case.what == PEFT:
                yield stack.enter_context(
                    peft_eager(
                        base,
                        data,
                        batch_size=case.batch_size,
                        rank=case.rank,
                        rows_per_microbatch=rows_per_microbatch,
                        method=case.method,
                    )
                )
            elif case.what in (BFLOAT16, FLOAT32):
                yield stack.enter_context(
                    peft_compiled(
                        base,
                        data,
                        batch_size=case.batch_size,
                        rank=case.rank,
                        rows_per_microbatch=rows_per_microbatch,
                        float32=case.what == FLOAT32,
                        backend=self.options.compile_backend,
                    )
                )
            else:
                assert case.what == PACKED, case.what
                engine = packed_engine(
                    base,
                    data,
                    num_slots=case.num_adapters,
                    tokens_per_step=self._tokens_per_step(SHAPES[case.shape]),
                    rank=case.rank,
                    method=case.method,
                )
                trials = [self._trial(case, data, slot=slot) for slot in range(case.num_adapters)]
                yield stack.enter_context(packed(engine, data, trials))
                self._pack = engine.shape

    def _trial(self, case: Case, data: PreparedData, *, slot: int) -> Any:
        return long_trial(
            data, slot=slot, batch_size=case.batch_size, rank=case.rank, method=case.method
        )

    def _tokens_per_step(self, shape: Shape) -> int:
        return self.options.tokens_per_step or shape.tokens_per_step

    def _base_of(self, shape: Shape) -> Base:
        if self._base is None or self._shape is not shape:
            self._base = None  # The old base goes before the new one comes.
            self._data.clear()
            release_memory(self.device)
            self._shape = shape
            self._base = random_base(shape, device=self.device, precision=self.options.precision)
        return self._base

    def _rows(self, case: Case) -> PreparedData:
        shape = SHAPES[case.shape]
        self._base_of(shape)
        if case.rows not in self._data:
            make: Callable[[Shape], PreparedData] = (
                equal_rows if case.rows == "equal" else gsm8k_like_rows
            )
            self._data[case.rows] = make(shape)
        return self._data[case.rows]


@contextmanager
def _no_compiled_code() -> Generator[None]:
    """Compile as on a machine that never did: an empty cache of inductor and triton."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


# ---------------------------------------------------------------------------- results


def read_results(path: Path) -> list[Result]:
    """What `write_results` wrote."""
    read = json.loads(path.read_text(encoding="utf-8"))
    return [Result(**{**one, "case": Case(**one["case"])}) for one in read["results"]]


def write_results(path: Path, results: Sequence[Result], *, about: dict[str, Any]) -> None:
    """Everything so far, by replacing the file: a killed run leaves a whole one behind."""
    beside = path.with_suffix(".partial")
    beside.write_text(
        json.dumps({**about, "results": [asdict(one) for one in results]}, indent=1),
        encoding="utf-8",
    )
    beside.replace(path)


def table(results: Iterable[Result]) -> str:
    """The results as a Markdown table; `x PEFT` is against eager PEFT on equal work."""
    results = list(results)
    columns = (
        "shape",
        "precision",
        "what",
        "method",
        "rows",
        "adapters",
        "batch size",
        "rank",
        "rows/s",
        "tokens/s",
        "TFLOP/s",
        "x PEFT",
        "peak GiB",
        "planned GiB",
        "first step s",
        "seconds",
        "note",
    )
    eager = {
        _work(one.case): one.rows_per_second
        for one in results
        if one.case.what == PEFT and one.rows_per_second
    }
    lines = [_line(columns), _line(["---"] * len(columns))]
    for one in results:
        case = one.case
        alone = eager.get(_work(case))
        trains = case.what not in ("matmul", "copy")
        lines.append(
            _line(
                (
                    case.shape,
                    case.precision if trains else "",
                    case.what + (", cold" if case.cold else ""),
                    case.method if trains else "",
                    case.rows if trains else "",
                    case.num_adapters if trains else "",
                    case.batch_size if trains else "",
                    case.rank if trains else "",
                    _number(one.rows_per_second),
                    _number(one.tokens_per_second),
                    _number(one.flops_per_second, 1e12),
                    _number(one.rows_per_second, alone) if alone else "",
                    _number(one.peak_memory_bytes, 2**30),
                    _number(one.planned_memory_bytes, 2**30),
                    _number(one.first_step_seconds),
                    _number(one.seconds_measured),
                    _note(one),
                )
            )
        )
    return "\n".join(lines)


def _work(case: Case) -> tuple[Any, ...]:
    return case.shape, case.precision, case.batch_size, case.rank, case.method, case.rows


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three figures, without exponents."""
    if value is None:
        return ""
    scaled = value / unit
    return f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"


def _note(one: Result) -> str:
    if one.error is not None:
        return one.error.replace("|", "/")[:120]
    if one.bytes_per_second is not None:
        return f"{one.bytes_per_second / 1e12:.2f} TB/s"
    if one.rows_per_microbatch not in (None, one.case.batch_size):
        return f"{one.rows_per_microbatch} rows at once"
    if one.tokens_per_step is not None:
        text = f"{one.tokens_per_step} tokens a step"
        short = one.num_slots is not None and one.num_slots < one.case.num_adapters
        return f"{text}, only {one.num_slots} slots fit" if short else text
    return ""


# ---------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=_names(SHAPES), default=["135m", "0.6b", "1b", "7b"])
    parser.add_argument("--only", type=_names(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--batch-sizes", type=_numbers, help="default: those of each shape")
    parser.add_argument("--adapters", type=int, help="in a pack; default: enough to fill a step")
    parser.add_argument("--tokens-per-step", type=int, help="of a pack; default: by shape")
    parser.add_argument("--precision", choices=("bfloat16", "nf4"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--minutes", type=float, help="start no case that may end later")
    parser.add_argument("--json", type=Path, help="write results here as they come")
    parser.add_argument("--resume", action="store_true", help="keep and skip what --json holds")
    parser.add_argument("--profile", type=Path, help="write where a case's time goes, and stop")
    parser.add_argument("--profile-what", choices=(PEFT, BFLOAT16, FLOAT32, PACKED), default=PACKED)
    parser.add_argument("--profile-updates", type=int, default=4)
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.precision == "nf4" and "compiled" in options.only:
        parser.error("--precision nf4 has no strongest loop for one adapter; leave compiled out")
    if options.resume and options.json is None:
        parser.error("--resume needs --json")
    return options


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    allowed = list(known)

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r}; choose from {', '.join(allowed)}")
        return chosen

    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    begun = time.perf_counter()
    options = parse(arguments)
    # PEFT asks transformers for an old name; nothing to do with what is measured.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    bench = Bench(options)
    if options.profile is not None:
        shape = SHAPES[options.shapes[0]]
        size = (options.batch_sizes or shape.batch_sizes)[0]
        num = options.adapters or _num_adapters(shape, size, options)
        what = options.profile_what
        case = Case(
            what, shape.name, num if what == PACKED else 1, size, precision=options.precision
        )
        bench.profile(case, options.profile, num_updates=options.profile_updates)
        return 0
    cases = list[Case]()
    if "matmul" in options.only:
        cases += [Case("matmul", ""), Case("copy", "")]
    for name in options.shapes:
        cases += cases_of(SHAPES[name], options)

    results = list[Result]()
    if options.resume and options.json.exists():
        results = [one for one in read_results(options.json) if one.error is None]
    done = {one.case.key for one in results}
    about = _about(bench, options)
    longest = 0.0
    for number, case in enumerate(cases):
        if case.key in done:
            continue
        since = time.perf_counter()
        if options.minutes is not None and since - begun + longest > 60 * options.minutes:
            print(f"out of time: {len(cases) - number} cases left out", file=sys.stderr)
            break
        results.append(bench.measure(case))
        longest = max(longest, time.perf_counter() - since)
        if options.json is not None:
            write_results(options.json, results, about=about)
        print(table(results).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(results))
    return 0


def _about(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "device": bench.device_name,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "seconds": options.seconds,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Answers of many adapters on one device: generate one adapter at a time, and all of them at once.

    python benchmarks/decoding.py --shapes 135m,7b --json decoding.json --minutes 9

All in one process over one base model a shape, random weights and prompts as long as GSM8K's
questions. What each row is stands in docs/benchmarks.md. A case that fails is recorded with its
reason and the others go on. Not covered: sampling, stop strings, several devices.
"""

import argparse
import json
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig

from loratune.engine.decoding import Decoder, Request
from loratune.engine.decoding_model import cache_bytes_per_token
from loratune.methods.adapter_files import AdapterFiles
from loratune.methods.attach_files import attach_files
from loratune.models.load import Base
from measure import copy_bytes_per_second, peak_memory_bytes, release_memory, synchronise
from model_shapes import SHAPES, Shape
from random_adapters import random_adapter
from random_model import random_base
from random_rows import GSM8K_LENGTHS

COPY, MERGED, UNMERGED, MANY = "copy", "merged", "unmerged", "many"
KINDS = (COPY, MERGED, UNMERGED, MANY)
# GSM8K's rows are template, question and answer; an assumption: so much of a row is the prompt.
PROMPT_SHARE = 0.6
ADAPTERS = {"135m": 64, "0.6b": 32, "1b": 16, "7b": 8, "tiny": 3}


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    `limits`: "equal", every answer has `new_tokens`; "gsm8k", answers are as long as GSM8K's.
    `rows_at_once` is generate's batch; None for many adapters at once, which choose by themselves.
    """

    what: str
    shape: str = ""
    limits: str = "equal"
    num_adapters: int = 1
    num_questions: int = 0
    new_tokens: int = 0
    rank: int = 0
    rows_at_once: int | None = None

    @property
    def key(self) -> str:
        """What `--resume` knows it by."""
        return "/".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


@dataclass(frozen=True, slots=True)
class Result:
    """What one case came to; None where it does not apply, `error` where it failed.

    `bound_tokens_per_second` is what reading the weights, the keys and values and the adapters of
    every step once would take at the copy's rate.
    """

    case: Case
    device: str
    tokens_per_second: float | None = None
    num_tokens: int | None = None
    seconds: float | None = None
    first_answer_seconds: float | None = None
    num_slots: int | None = None
    bound_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    bytes_per_second: float | None = None
    error: str | None = None


def cases_of(shape: Shape, options: argparse.Namespace) -> list[Case]:
    """The cases of one shape: generate's first, so that the table can divide by them."""
    num_adapters = options.adapters or ADAPTERS[shape.name]
    cases = list[Case]()
    for limits in options.limits:
        common: dict[str, Any] = {
            "shape": shape.name,
            "limits": limits,
            "new_tokens": options.new_tokens,
            "rank": options.rank,
        }
        batch = options.rows_per_batch
        # One batch says how fast it goes: all questions of all adapters would take hours.
        alone = {**common, "num_questions": batch, "rows_at_once": batch}
        many = {**common, "num_questions": options.questions, "num_adapters": num_adapters}
        cases += [Case(MERGED, **alone), Case(UNMERGED, **alone), Case(MANY, **many)]
    return [case for case in cases if case.what in options.only]


@dataclass(frozen=True, slots=True)
class Questions:
    """Prompts as tokens, and how many tokens each answer has."""

    prompts: list[list[int]]
    limits: list[int]


def questions(shape: Shape, case: Case, *, seed: int = 0) -> Questions:
    """As long as GSM8K's, by the histogram of whole rows and an assumed share of the prompt."""
    generator = np.random.default_rng(seed)
    centres = np.array(list(GSM8K_LENGTHS))
    shares = np.array(list(GSM8K_LENGTHS.values())) / sum(GSM8K_LENGTHS.values())
    rows = generator.choice(centres, size=case.num_questions, p=shares)
    rows += generator.integers(-8, 8, size=len(rows))
    lengths = np.maximum(1, (PROMPT_SHARE * rows).astype(int))
    limits = np.full(len(rows), case.new_tokens)
    if case.limits == "gsm8k":
        limits = np.clip(generator.permutation(rows - lengths), 1, case.new_tokens)
    return Questions(
        [generator.integers(4, shape.vocab_size, size=length).tolist() for length in lengths],
        limits.tolist(),
    )


class Bench:
    """One base at a time, and its adapters."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.device_name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
        )
        self.copy_rate: float | None = None
        self._shape: Shape | None = None
        self._base: Base | None = None
        self._adapters = list[AdapterFiles]()

    def measure(self, case: Case) -> Result:
        """One case. Out of memory or broken is a result too."""
        try:
            if case.what == COPY:
                return self._copy(case)
            self.base_of(case)
            release_memory(self.device)
            if case.what == MANY:
                return self._many(case)
            return self._alone(case)
        except Exception as raised:  # noqa: BLE001  # one broken case must not cost the others
            traceback.print_exc()
            error = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        return Result(case, self.device_name, error=error)

    def base_of(self, case: Case) -> Base:
        """The base of a case's shape, with as many adapters as it needs."""
        shape = SHAPES[case.shape]
        if self._base is None or self._shape is not shape:
            self._base = None  # The old base goes before the new one comes.
            self._adapters.clear()
            release_memory(self.device)
            self._shape, self._base = shape, random_base(shape, device=self.device)
        while len(self._adapters) < case.num_adapters:
            seed = len(self._adapters)
            self._adapters.append(random_adapter(self._base, rank=case.rank, seed=seed))
        return self._base

    def _copy(self, case: Case) -> Result:
        num_bytes = 2**31 if self.device.type == "cuda" else 2**24
        self.copy_rate = copy_bytes_per_second(num_bytes, device=self.device, seconds=2.0)
        return Result(case, self.device_name, bytes_per_second=self.copy_rate)

    def _alone(self, case: Case) -> Result:
        """transformers' generate, one full batch after a short one.

        Merged is the base itself: what its weights say does not change the time.
        """
        base = self.base_of(case)
        asked = questions(SHAPES[case.shape], case)
        attached = attach_files(base.model, self._adapters[0]) if case.what == UNMERGED else None
        try:
            _generate(base, asked, max_new_tokens=2)
            synchronise(self.device)
            since = time.perf_counter()
            # A batch goes on until its longest answer has ended; only what was asked for counts.
            _generate(base, asked, max_new_tokens=max(asked.limits))
            synchronise(self.device)
            seconds = time.perf_counter() - since
        finally:
            if attached is not None:
                attached.detach()
        return Result(
            case,
            self.device_name,
            tokens_per_second=sum(asked.limits) / seconds,
            num_tokens=sum(asked.limits),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def _many(self, case: Case) -> Result:
        """From the adapters in memory to the last answer: reading, installing and capturing too."""
        base = self.base_of(case)
        asked = questions(SHAPES[case.shape], case)
        requests = self.requests(case, asked)
        synchronise(self.device)
        since = time.perf_counter()
        decoder = self.decoder(case)
        num_tokens, first = 0, 0.0
        for number, one in enumerate(decoder.answers(requests)):
            if number == 0:
                first = time.perf_counter() - since
            num_tokens += one.answer.num_tokens
        synchronise(self.device)
        seconds = time.perf_counter() - since
        bound = self._bound_seconds(base, case, asked, num_slots=decoder.num_slots or 1)
        return Result(
            case,
            self.device_name,
            tokens_per_second=num_tokens / seconds,
            num_tokens=num_tokens,
            seconds=seconds,
            first_answer_seconds=first,
            num_slots=decoder.num_slots,
            bound_tokens_per_second=None if bound is None else num_tokens / bound,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def decoder(self, case: Case) -> Decoder:
        """As a caller makes it, from adapters in memory."""
        adapters = {str(at): one for at, one in enumerate(self._adapters[: case.num_adapters])}
        return Decoder(self.base_of(case), adapters, num_slots=self.options.slots)

    def requests(self, case: Case, asked: Questions) -> list[Request]:
        """Every question to every adapter."""
        return [
            Request(str(at), prompt, limit)
            for at in range(case.num_adapters)
            for prompt, limit in zip(asked.prompts, asked.limits, strict=True)
        ]

    def _bound_seconds(
        self, base: Base, case: Case, asked: Questions, *, num_slots: int
    ) -> float | None:
        """Weights, keys and values, adapters: each read once a step, at the copy's rate.

        A step has `num_slots` rows, of as few adapters as that takes. Prompts and all arithmetic
        are left out.
        """
        if self.copy_rate is None:
            return None
        weights = sum(
            one.numel() * one.element_size()
            for one in base.model.parameters()
            # Of the embedding a step reads its rows' alone, unless it is the head too.
            if one is not base.model.get_input_embeddings().weight
            or one is base.model.get_output_embeddings().weight
        )
        steps = case.num_adapters * sum(asked.limits) / num_slots
        rows = min(num_slots, case.num_adapters * case.num_questions)
        of_adapter = sum(one.numel() for one in self._adapters[0].tensors.values())
        in_step = min(case.num_adapters, -(-rows // case.num_questions))
        adapters = in_step * of_adapter * base.model.dtype.itemsize
        attended = case.num_adapters * sum(
            limit * len(prompt) + limit * (limit + 1) / 2
            for prompt, limit in zip(asked.prompts, asked.limits, strict=True)
        )
        moved = steps * (weights + adapters) + attended * cache_bytes_per_token(base.model)
        return moved / self.copy_rate

    def profile(self, case: Case, path: Path) -> None:
        """Where the time of many adapters goes, kernel by kernel, the first answers left out."""
        on_cuda = self.device.type == "cuda"
        self.base_of(case)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        answers = self.decoder(case).answers(
            self.requests(case, questions(SHAPES[case.shape], case))
        )
        next(answers)
        with profile(activities=activities) as profiled:
            since = time.perf_counter()
            num_tokens = 0
            for one in answers:
                num_tokens += one.answer.num_tokens
                if time.perf_counter() - since > self.options.profile_seconds:
                    break
            synchronise(self.device)
            seconds = time.perf_counter() - since
        answers.close()
        averages = profiled.key_averages()
        column = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        kernels = [one for one in averages if not on_cuda or str(one.device_type).endswith("CUDA")]
        busy = sum(getattr(one, column) for one in kernels) / 1e6
        lines = [
            case.key,
            f"{self.device_name}: answers of {num_tokens} tokens in {seconds:.3f} s; "
            f"kernels {busy:.3f} s ({busy / seconds:.0%})",
            f"{'ms':>10} {'share':>7} {'calls':>7}  name",
        ]
        for one in sorted(kernels, key=lambda one: -getattr(one, column))[:40]:
            spent = getattr(one, column) / 1e6
            lines.append(f"{spent * 1e3:10.2f} {spent / busy:7.1%} {one.count:7d}  {one.key[:140]}")
        path.write_text("\n".join(lines), encoding="utf-8")


def _generate(base: Base, asked: Questions, *, max_new_tokens: int) -> None:
    width = max(len(prompt) for prompt in asked.prompts)
    ids = torch.tensor([[0] * (width - len(one)) + one for one in asked.prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in asked.prompts])
    generate: Any = base.model.generate
    generate(
        ids.to(base.device),
        attention_mask=mask.to(base.device),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, use_cache=True
        ),
    )


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
    """The results as a Markdown table; `x merged` is against generate with a merged adapter."""
    results = list(results)
    columns = (
        "shape",
        "what",
        "answers",
        "adapters",
        "questions",
        "rows at once",
        "tokens/s",
        "x merged",
        "bound tokens/s",
        "of bound",
        "tokens",
        "seconds",
        "first answer s",
        "peak GiB",
        "note",
    )
    merged = {
        (one.case.shape, one.case.limits): one.tokens_per_second
        for one in results
        if one.case.what == MERGED and one.tokens_per_second
    }
    lines = [_line(columns), _line(["---"] * len(columns))]
    for one in results:
        case, speed, bound = one.case, one.tokens_per_second, one.bound_tokens_per_second
        alone = merged.get((case.shape, case.limits))
        answers = case.what != COPY
        lines.append(
            _line(
                (
                    case.shape,
                    case.what,
                    case.limits if answers else "",
                    case.num_adapters if answers else "",
                    case.num_questions if answers else "",
                    case.rows_at_once or one.num_slots or "",
                    _number(speed),
                    _number(speed / alone) if speed and alone else "",
                    _number(bound),
                    f"{speed / bound:.0%}" if speed and bound else "",
                    one.num_tokens or "",
                    _number(one.seconds),
                    _number(one.first_answer_seconds),
                    _number(
                        None if one.peak_memory_bytes is None else one.peak_memory_bytes / 2**30
                    ),
                    _note(one),
                )
            )
        )
    return "\n".join(lines)


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _number(value: float | None) -> str:
    """Three figures, without exponents."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _note(one: Result) -> str:
    if one.error is not None:
        return one.error.replace("|", "/")[:120]
    if one.bytes_per_second is not None:
        return f"{one.bytes_per_second / 1e12:.2f} TB/s"
    return ""


# ---------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=_names(SHAPES), default=["135m", "7b"])
    parser.add_argument("--only", type=_names(KINDS), default=list(KINDS))
    parser.add_argument("--limits", type=_names(("equal", "gsm8k")), default=["equal"])
    parser.add_argument("--adapters", type=int, help="default: by shape, 64 and 8")
    parser.add_argument("--questions", type=int, default=256, help="of each adapter")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slots", type=int, help="rows at once; default: what fits")
    parser.add_argument("--rows-per-batch", type=int, default=64, help="of generate")
    parser.add_argument("--minutes", type=float, help="start no case that may end later")
    parser.add_argument("--json", type=Path, help="write results here as they come")
    parser.add_argument("--resume", action="store_true", help="keep and skip what --json holds")
    parser.add_argument("--profile", type=Path, help="write where the time goes, and stop")
    parser.add_argument("--profile-seconds", type=float, default=3.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
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


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    begun = time.perf_counter()
    options = parse(arguments)
    # PEFT asks transformers for an old name; nothing to do with what is measured.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    bench = Bench(options)
    if options.profile is not None:
        options.only = [MANY]
        bench.profile(cases_of(SHAPES[options.shapes[0]], options)[0], options.profile)
        return 0
    cases = [Case(COPY)] if COPY in options.only else []
    for name in options.shapes:
        cases += cases_of(SHAPES[name], options)

    results = list[Result]()
    if options.resume and options.json.exists():
        results = [one for one in read_results(options.json) if one.error is None]
    bench.copy_rate = next((one.bytes_per_second for one in results if one.bytes_per_second), None)
    done = {one.case.key for one in results}
    about = _about(bench)
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


def _about(bench: Bench) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "device": bench.device_name,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Judging generated programs by their tests, each in two fresh processes of the sandbox."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import IO, Any, Literal

from loratune.evaluation.sandbox.isolation import (
    ENVIRONMENT,
    Isolation,
    Limits,
    sandbox_command,
)

DEFAULT_LIMITS = Limits()
_Verdict = Literal["correct", "wrong", "error"]


@dataclass(frozen=True, slots=True)
class Check:
    """A generated program and the tests that judge it.

    `program` is the only text here that is not trusted. `tests` call the program's functions by
    `names`; a name that the tests or `setup` define themselves is not among them. `setup` is the
    data set's own code that tests rely on, such as helpers in the prompt; it runs with the tests.
    """

    program: str
    tests: str
    names: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """`error` is a failure of the sandbox or the tests; the program is not to blame.

    A program that does not end, exits, or exceeds a limit is `wrong`. `reason` is for people; it
    may quote the program and is empty for `correct`.
    """

    verdict: _Verdict
    reason: str
    seconds: float


def judge_programs(
    checks: Sequence[Check],
    *,
    isolation: Isolation,
    limits: Limits = DEFAULT_LIMITS,
    workers: int | None = None,
) -> list[Judgement]:
    """The judgements of many programs, in their order, `workers` at once (None: one a core)."""
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        return list(pool.map(partial(judge_program, isolation=isolation, limits=limits), checks))
    finally:
        pool.shutdown(cancel_futures=True)


def judge_program(
    check: Check, *, isolation: Isolation, limits: Limits = DEFAULT_LIMITS
) -> Judgement:
    """Run the tests against the program. Nothing of either is left when this returns."""
    begin = perf_counter()
    try:
        verdict, reason = _judge(check, isolation=isolation, limits=limits)
    except OSError as error:  # no process, no descriptor or no space is left, say
        verdict, reason = "error", f"the sandbox did not start: {error}"
    return Judgement(verdict, reason, perf_counter() - begin)


def _judge(check: Check, *, isolation: Isolation, limits: Limits) -> tuple[_Verdict, str]:
    with ExitStack() as stack:
        complaints = stack.enter_context(tempfile.TemporaryFile())
        job = stack.enter_context(tempfile.TemporaryFile())
        # Lone surrogates are possible in a generated text, and JSON escapes them.
        job.write(json.dumps(asdict(check)).encode("ascii"))
        job.seek(0)
        with ExitStack() as ends:
            request_reader, request_writer = _pipe(ends)
            reply_reader, reply_writer = _pipe(ends)
            tests = stack.enter_context(
                _process(
                    isolation,
                    role="tests",
                    fds=(request_writer, reply_reader),
                    limits=limits,
                    stdin=job,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                )
            )
            stack.enter_context(
                _process(
                    isolation,
                    role="program",
                    fds=(request_reader, reply_writer),
                    limits=limits,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                )
            )
        is_late = False
        try:
            output, _ = tests.communicate(timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired as error:
            output, is_late = error.stdout or b"", True
        verdict, reason = _read(output, is_late=is_late, limits=limits)
        if verdict == "error":
            complaints.seek(0)
            lines = complaints.read(4000).decode(errors="replace").splitlines()
            reason = ": ".join([reason, *dict.fromkeys(lines)])  # both may have the same to say
    return verdict, reason


def _read(output: bytes, *, is_late: bool, limits: Limits) -> tuple[_Verdict, str]:
    """The verdict in what the asking process wrote: "ready", "called", then its verdict."""
    whole_lines = output.split(b"\n")[:-1]
    messages: list[dict[str, Any]] = [json.loads(line) for line in whole_lines]
    if messages and "verdict" in messages[-1]:
        return messages[-1]["verdict"], messages[-1]["reason"]
    if messages and is_late:
        return "wrong", f"no end within {limits.wall_seconds:g} seconds"
    if messages and "called" in messages[-1]:
        return "wrong", "the tests exceeded a limit with what the program gave them"
    if messages:
        return "error", "the tests' process ended without a verdict"
    return "error", "the sandbox did not start" + (" in time" if is_late else "")


def _pipe(stack: ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    return reader, writer


@contextmanager
def _process(
    isolation: Isolation,
    *,
    role: Literal["program", "tests"],
    fds: tuple[int, int],
    limits: Limits,
    stdin: IO[bytes] | int,
    stdout: int,
    stderr: IO[bytes],
) -> Generator[subprocess.Popen[bytes]]:
    """A process of the sandbox, dead at the end with all that it started."""
    # Behind walls a process has a folder of its own, in memory.
    with tempfile.TemporaryDirectory() if isolation.kind == "none" else nullcontext("/") as folder:
        process = subprocess.Popen(
            sandbox_command(isolation, role=role, fds=fds, limits=limits),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=fds,
            env=ENVIRONMENT,
            cwd=folder,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            # Isolated, all inside dies with this one process. Without isolation its session does,
            # or what has not left it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

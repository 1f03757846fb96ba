"""The asking process: it runs the tests, calls the program's functions by message, and judges.

The tests see a function of the program as a `Remote`: a call sends the arguments as data and gets
the answer as data. So every comparison is made here, with builtin types alone, in a process that
the program cannot see, and the verdict goes out through a file that the program does not have. A
program that replaces builtins, walks the garbage collector, exits or writes to every descriptor it
has changes its own answers and nothing else.

One thing a test must not forgive: when the answering process is gone or has sent something that is
no answer, the verdict is `wrong` whatever the test does about the exception.
"""

import builtins
import json
import signal
from typing import Any, BinaryIO, TextIO, cast

from . import wire


class TestsFailed(BaseException):
    """Ends the tests; `except Exception` in a test does not stop it."""


class ProgramError(Exception):
    """An exception of the program that has no builtin class to stand for it."""


class _Program:
    """The other process, as far as the tests may know it."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO, verdicts: TextIO) -> None:
        self._requests = requests
        self._replies = replies
        self._verdicts = verdicts
        self._num_requests = 0
        self.fault: str | None = None  # of the program: the verdict is wrong
        self.error: str | None = None  # of the tests or the sandbox: no verdict is possible

    def wait_until_ready(self) -> bool:
        try:
            return wire.receive(self._replies) == {"ready": True}
        except wire.WireError:
            return False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.fault or self.error:
            raise TestsFailed
        self._num_requests += 1
        if self._num_requests == 2:  # The first defines it.
            _say(self._verdicts, {"called": True})
        try:
            wire.send(self._requests, {"id": self._num_requests, **request})
        except wire.WireError as error:
            raise self.stop(error=f"the tests send too much: {error}") from error
        except OSError as error:
            raise self.stop(fault="the program ended before it was asked") from error
        try:
            reply = wire.receive(self._replies)
        except wire.WireError as error:
            raise self.stop(fault=f"the program sent {error}") from error
        if reply is None:
            raise self.stop(fault="the program ended before it answered (an exit or a limit)")
        if reply.get("id") != self._num_requests:
            raise self.stop(fault="the program sent an answer that nobody asked for")
        if "raised" in reply:
            raise _exception(reply)
        if "value" not in reply:
            raise self.stop(fault="the program sent an answer without a value")
        return reply

    @property
    def was_called(self) -> bool:
        return self._num_requests > 1

    def value(self, data: Any) -> Any:
        try:
            return wire.unpack(data)
        except wire.WireError as error:
            raise self.stop(fault=f"the program sent {error}") from error

    def stop(self, *, fault: str | None = None, error: str | None = None) -> TestsFailed:
        self.fault = self.fault or fault
        self.error = self.error or error
        return TestsFailed()


class Remote:
    """A function of the program. Calling it asks the program."""

    def __init__(self, name: str, program: _Program) -> None:
        self.__name__ = name
        self._program = program

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """What the program answers, or the exception that it raised.

        An argument that the program changed in place is changed here, too, where it is a list, a
        dict or a set.
        """
        packed = [wire.pack(one) for one in arguments]
        packed_keywords = {name: wire.pack(one) for name, one in keywords.items()}
        if wire.holds_opaque([packed, *packed_keywords.values()]):
            raise self._program.stop(
                error=f"the tests give {self.__name__} an argument that is no plain data"
            )
        reply = self._program.ask(
            {"function": self.__name__, "arguments": packed, "keywords": packed_keywords}
        )
        changed = reply.get("arguments", packed)
        if not isinstance(changed, list) or len(cast("list[Any]", changed)) != len(arguments):
            raise self._program.stop(fault="the program sent an answer without its arguments")
        for given, before, after in zip(arguments, packed, cast("list[Any]", changed), strict=True):
            if after != before:
                _change(given, self._program.value(after))
        return self._program.value(reply["value"])


def run_tests(job: dict[str, Any], requests: BinaryIO, replies: BinaryIO, verdicts: TextIO) -> None:
    """Run `job`, a `Check` as a dictionary; lines of JSON go to `verdicts`.

    The first says that the program's process was ready, the second that the program is called, the
    last is the verdict. It may be missing: work in C on a value of the program's, as on a number of
    a billion digits, cannot be interrupted from here, and ends with a limit.
    """
    program = _Program(requests, replies, verdicts)
    if not program.wait_until_ready():
        _say(verdicts, {"verdict": "error", "reason": "the program's process did not start"})
        return
    _say(verdicts, {"ready": True})
    # The soft limit comes a second before the one that kills.
    signal.signal(signal.SIGXCPU, _out_of_time)
    verdict, reason = _judge(job, program)
    _say(verdicts, {"verdict": verdict, "reason": reason[:500]})


def _judge(job: dict[str, Any], program: _Program) -> tuple[str, str]:
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        setup = compile(job["setup"], "<setup>", "exec")
        tests = compile(job["tests"], "<tests>", "exec")
        exec(setup, names)
    except BaseException as error:  # noqa: BLE001  # data that cannot be used, for any reason
        return "error", f"the task's own code fails: {_name_of(error)}"
    names.update({name: Remote(name, program) for name in job["names"]})
    reason = ""
    try:
        program.ask({"program": job["program"]})
        exec(tests, names)
    except BaseException as error:  # noqa: BLE001  # whatever ends the tests early
        reason = _name_of(error)
    if program.error:
        return "error", program.error
    if program.fault:
        return "wrong", program.fault
    if reason:
        return "wrong", reason
    if not program.was_called:
        return "error", "the tests never called the program"
    return "correct", ""


def _say(verdicts: TextIO, message: dict[str, Any]) -> None:
    verdicts.write(json.dumps(message) + "\n")
    verdicts.flush()


def _out_of_time(*_: Any) -> None:
    raise TestsFailed("the tests ran out of CPU time")


def _name_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _exception(reply: dict[str, Any]) -> Exception:
    kind = getattr(builtins, str(reply["raised"]), None)
    text = str(reply.get("text"))
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like are made of more than a text
            pass
    return ProgramError(text)


def _change(given: Any, value: Any) -> None:
    if isinstance(given, list) and isinstance(value, list):
        given[:] = value
    elif isinstance(given, (dict, set)) and isinstance(value, (dict, set)):
        collection = cast("Any", given)
        collection.clear()
        collection.update(value)

"""The answering process: it runs the generated program and answers calls to its functions.

It is not trusted, nor does it need to be: it knows no test and no expected value, and all that it
can do is to send bytes, which the asking process takes for the program's answers.
"""

import os
import sys
from types import ModuleType
from typing import Any, BinaryIO

from . import wire

MODULE = "program"


def answer_calls(requests: BinaryIO, replies: BinaryIO) -> None:
    """Serve until the requests end, or the program ends the process."""
    wire.send(replies, {"ready": True})
    module = ModuleType(MODULE)  # not __main__: what a program does as a script is not asked for
    sys.modules[MODULE] = module
    while (request := wire.receive(requests)) is not None:
        reply = _reply(request, module.__dict__)
        try:
            wire.send(replies, {"id": request["id"], **reply})
        except wire.WireError as error:
            wire.send(replies, {"id": request["id"], **_raised(error)})
    os._exit(0)


def _reply(request: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    try:
        if "program" in request:
            exec(compile(request["program"], "<program>", "exec"), names)
            return {"value": None}
        if request["function"] not in names:
            raise NameError(f"name {request['function']!r} is not defined")
        arguments = [wire.unpack(one) for one in request["arguments"]]
        keywords = {name: wire.unpack(one) for name, one in request["keywords"].items()}
        value = names[request["function"]](*arguments, **keywords)
        reply = {"value": wire.pack(value)}
        # A list that the program sorted in place is sorted for the test, too.
        after = [wire.pack(one) for one in arguments]
        if after != request["arguments"]:
            reply["arguments"] = after
    except Exception as error:  # noqa: BLE001  # whatever the program raises is its answer
        return _raised(error)
    except BaseException:  # noqa: BLE001  # SystemExit and its like end a program
        os._exit(1)
    return reply


def _raised(error: Exception) -> dict[str, Any]:
    for kind in type(error).__mro__:  # the nearest builtin class is what the tests can catch
        if kind.__module__ == "builtins":
            try:
                text = str(error)[:500]
            except Exception:  # noqa: BLE001  # the program's own class may fail at it
                text = ""
            return {"raised": kind.__name__, "text": text}
    raise AssertionError(type(error))

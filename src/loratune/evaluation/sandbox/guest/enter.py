"""The first steps of a process of the sandbox: behind the walls, then into its role."""

import json
import os
import sys
from typing import Any

from . import answer, ask, confine


def main(options_text: str) -> None:
    """Become what `options_text` says, a JSON object made by isolation.py; does not return."""
    options: dict[str, Any] = json.loads(options_text)
    requests_fd, replies_fd = options["fds"]
    limits: dict[str, int] = options["limits"]
    sys.argv[:] = [""]  # it names folders of the machine
    sys.path.remove(options["guest_path"])  # all of it is loaded; the program need not find it
    sys.path += options["package_paths"]
    try:
        if options["enter_namespaces"]:
            confine.enter_namespaces(
                [(source, target) for source, target in options["binds"]],
                covers=options["covers"],
                with_user=options["with_user"],
                pass_fds=(requests_fd, replies_fd),
            )
        if options["isolated"]:
            confine.give_up_privileges(
                **limits, user=options["user"], is_root_outside=options["is_root_outside"]
            )
        else:
            confine.limit(**limits)
    except OSError as error:
        confine.report(error)
    # The tests' job is on standard input, their verdict goes to standard output; the program has
    # neither. What either prints goes nowhere.
    job: dict[str, Any] = json.load(sys.stdin) if options["role"] == "tests" else {}
    verdicts = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    if options["role"] == "tests":
        ask.run_tests(job, os.fdopen(requests_fd, "wb"), os.fdopen(replies_fd, "rb"), verdicts)
    else:
        verdicts.close()
        answer.answer_calls(os.fdopen(requests_fd, "rb"), os.fdopen(replies_fd, "wb"))
    os._exit(0)

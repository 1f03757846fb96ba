"""Which isolation this machine offers: each kind is tried, none is assumed."""

import os
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from loratune.errors import EvaluationError
from loratune.evaluation.sandbox.isolation import Isolation, Limits
from loratune.evaluation.sandbox.judging import Check, judge_program

# Tells what it could do that it must not. In a sandbox there is nothing to tell.
_PROBE = """
import os, socket

def escapes(secret, installed):
    found = []
    for name, attempt in (
        ("reads a file", lambda: open(secret).read()),
        # The other one may lie where the sandbox has its own folder.
        ("reads the users", lambda: open("/etc/passwd").read()),
        ("finds installed packages", lambda: next(filter(listed, installed))),
        ("sees other processes", lambda: os.listdir("/proc")),
        ("writes a file", lambda: open(os.path.join(os.path.dirname(secret), "x"), "w")),
        ("reaches its parent", lambda: os.kill(os.getppid() or 2, 0) if os.getpid() > 9 else 1/0),
        ("has a network", lambda: socket.create_connection(("192.0.2.1", 9), 0.01)),
    ):
        try:
            attempt()
        except TimeoutError:
            found.append(name)
        except Exception:
            continue
        else:
            found.append(name)
    return found

def listed(folder):
    return os.path.isdir(folder) and os.listdir(folder)
"""
_LIMITS = Limits(cpu_seconds=5, wall_seconds=10.0)


def choose_isolation(*, unsafe_exec: bool = False) -> Isolation:
    """The strongest isolation that works here.

    Args:
        unsafe_exec: run generated code without isolation where there is none. Where there is, it
            is used all the same.

    Raises:
        EvaluationError: there is none, and `unsafe_exec` is False.
    """
    found = available_isolations()
    if found:
        return found[0]
    if unsafe_exec:
        return Isolation("none")
    reasons = "; ".join(f"{_name(one)}: {reason}" for one, reason in trials() if reason)
    raise EvaluationError(
        "generated code cannot be isolated on this machine, so it is not run. Install bubblewrap, "
        "allow user namespaces, or accept the danger with --unsafe-exec (unsafe_exec=True), best "
        f"in a container or virtual machine that can be thrown away. Tried: {reasons}"
    )


def available_isolations() -> tuple[Isolation, ...]:
    """Every isolation that works here, the strongest first. The first call tries them."""
    return tuple(one for one, reason in trials() if not reason)


@cache
def trials() -> tuple[tuple[Isolation, str], ...]:
    """Each kind of isolation, with why it does not work here; an empty text: it does."""
    # Root needs no user namespace, and is then able to become a user that nobody is.
    users = (False, True) if os.geteuid() == 0 else (True,)
    kinds = [Isolation("bubblewrap", with_user=one) for one in users]
    kinds += [Isolation("namespaces", with_user=one) for one in users]
    return tuple((one, _why_not(one)) for one in kinds)


def _why_not(isolation: Isolation) -> str:
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_text("secret", encoding="ascii")
        check = Check(
            program=_PROBE,
            tests=f"found = escapes({str(secret)!r}, {_installed()!r})\n"
            "assert not found, f'it {found}'",
            names=("escapes",),
        )
        judgement = judge_program(check, isolation=isolation, limits=_LIMITS)
    return "" if judgement.verdict == "correct" else judgement.reason or "it does not isolate"


def _installed() -> list[str]:
    """Where packages are installed, here and for the Python that this environment was made of."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    kinds = ("purelib", "platlib")
    return sorted({sysconfig.get_path(one, vars=names) for one in kinds for names in (None, base)})


def _name(isolation: Isolation) -> str:
    return isolation.kind + (" with a user namespace" if isolation.with_user else "")

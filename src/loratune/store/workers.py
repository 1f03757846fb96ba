"""Which process holds a claim, and whether it is certainly gone.

A process is named by the machine it runs on, its pid and its start time, because pids are used
again. "Certainly" is one-sided on purpose: a process that cannot be seen from here (another
machine, another container, the time before a reboot) is never called gone, so its claim has to
expire by its heartbeat.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

# The start time is the kernel's boot time plus ticks, and the boot time moves by fractions of a
# second when the clock is disciplined. No pid comes back that soon.
START_TOLERANCE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Worker:
    """One process. `host` names the machine and its table of pids; `started` is epoch seconds."""

    host: str
    pid: int
    started: float


def this_worker() -> Worker:
    """The process that asks."""
    pid = os.getpid()
    return Worker(host=_host(), pid=pid, started=psutil.Process(pid).create_time())


def is_gone(worker: Worker) -> bool:
    """Whether the worker's process certainly runs no more; False where it cannot be known."""
    if worker.host != _host():
        return False
    try:
        process = psutil.Process(worker.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        started = process.create_time()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
    return abs(started - worker.started) > START_TOLERANCE_SECONDS


def _host() -> str:
    """The host's name, and on Linux its boot and pid namespace.

    Containers may share a name while each has its own pid 1.
    """
    parts = [platform.node()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        pass  # not Linux: the name has to do
    return " ".join(parts)

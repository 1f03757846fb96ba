import os
import subprocess
import sys
from dataclasses import replace

import psutil

from loratune.store.workers import Worker, is_gone, this_worker


def test_this_process_is_not_gone() -> None:
    assert this_worker().pid == os.getpid()
    assert not is_gone(this_worker())


def test_a_process_is_gone_once_it_has_ended_even_before_it_is_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        worker = Worker(
            host=this_worker().host,
            pid=process.pid,
            started=psutil.Process(process.pid).create_time(),
        )
        assert not is_gone(worker)
        process.kill()
        # Not process.wait(), which would reap it: it stays behind as a zombie.
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert is_gone(worker)
    assert is_gone(worker)


def test_a_pid_that_was_used_again_is_another_process() -> None:
    assert is_gone(replace(this_worker(), started=this_worker().started - 60))


def test_a_process_of_another_machine_or_container_is_never_called_gone() -> None:
    assert not is_gone(Worker(host="elsewhere", pid=2**22 + 1, started=0.0))

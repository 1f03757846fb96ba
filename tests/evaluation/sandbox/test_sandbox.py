"""Hostile programs, each judged behind every isolation of this machine, and without any.

Where a kind of isolation is missing, its tests are skipped and say so.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hostile_programs import CONTAINED, ESCAPES, FAKES, FORGERS, GLUTTONS
from loratune.errors import EvaluationError
from loratune.evaluation.sandbox import (
    Check,
    Isolation,
    Limits,
    available_isolations,
    choose_isolation,
    choosing,
    judge_program,
    judge_programs,
)

NONE = Isolation("none")
GOOD = Check("def f():\n    return 42", "assert f() == 42", ("f",))
# Short, and little memory, so that gluttons are soon at their end; the wall time is generous
# enough for a busy machine except where it is what is tested.
LIMITS = Limits(cpu_seconds=1, wall_seconds=20.0, memory_bytes=1 << 28)
SLEEPERS_LIMITS = Limits(cpu_seconds=1, wall_seconds=1.5, memory_bytes=1 << 28)


def name(one):
    return one.name


def one_of_each_kind():
    """The strongest of each kind that works here."""
    kinds = {}
    for one in available_isolations():
        kinds.setdefault(one.kind, one)
    return kinds


@pytest.fixture(params=["bubblewrap", "namespaces"])
def isolation(request):
    kinds = one_of_each_kind()
    if request.param not in kinds:
        reasons = {one.kind: reason for one, reason in choosing.trials()}
        pytest.skip(f"{request.param} does not work here: {reasons[request.param]}")
    return kinds[request.param]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """What programs are after; gives a function that puts it into their texts, and a check."""
    token = secrets.token_hex(8)
    monkeypatch.setenv("A_SECRET", token)
    folder = tmp_path / "scene"
    folder.mkdir()
    (folder / "secret").write_text(token)
    victim = folder / "victim"
    victim.write_text("unharmed")
    victim.chmod(0o640)
    home = Path.home()
    bystander = subprocess.Popen(
        ["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    abstract = f"loratune-{token}"
    sockets = [socket.create_server(("127.0.0.1", 0))]
    for address in (str(folder / "socket"), f"\0{abstract}"):
        sockets.append(socket.socket(socket.AF_UNIX))
        sockets[-1].bind(address)
        sockets[-1].listen()
    for one in sockets:
        threading.Thread(target=greet, args=(one,), daemon=True).start()
    words = {
        "SECRET": str(folder / "secret"),
        "TOKEN": token,
        "VICTIM": str(victim),
        "OUTSIDE": str(folder / "outside"),
        "PORT": str(sockets[0].getsockname()[1]),
        "UNIX": str(folder / "socket"),
        "ABSTRACT": abstract,
        "PARENT": str(os.getpid()),
        "BYSTANDER": str(bystander.pid),
        "HOME": str(home),
        "LISTING": repr(sorted(os.listdir(home)) if home.is_dir() else None),
    }
    before = state(folder)

    def check(one):
        program, tests = (
            re.sub("@([A-Z]+)@", lambda word: words[word[1]], text)
            for text in (one.program, one.tests)
        )
        return Check(program, tests, ("f",))

    def is_unharmed():
        return state(folder) == before and bystander.poll() is None

    yield check, is_unharmed
    bystander.kill()
    bystander.wait()
    for one in sockets:
        one.shutdown(socket.SHUT_RDWR)
        one.close()


def greet(server):
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"hello")


def state(folder):
    return {
        path.name: (path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_nlink)
        + ((path.read_text(),) if path.is_file() else ())
        for path in sorted(folder.iterdir())
    }


def naive_verdict(check, *, cwd):
    """Program and tests in one process, which says `passed` at the end."""
    source = f"{check.program}\n{check.tests}\nprint('passed')\n"
    ended = subprocess.run(
        [sys.executable, "-c", source], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    return "correct" if ended.returncode == 0 and "passed" in ended.stdout else "wrong"


# ---------------------------------------------------------------------------- hostile programs


@pytest.mark.parametrize(
    "hostile", [*ESCAPES, *FAKES, *FORGERS, *GLUTTONS, *CONTAINED], ids=name
)
def test_a_hostile_program_is_contained_and_judged_and_the_next_one_unharmed(
    hostile, isolation, scene
):
    check, is_unharmed = scene
    limits = SLEEPERS_LIMITS if hostile.sleeps else LIMITS
    judgement = judge_program(check(hostile), isolation=isolation, limits=limits)
    assert judgement.verdict == hostile.verdict, judgement
    assert is_unharmed()
    assert judge_program(GOOD, isolation=isolation, limits=LIMITS).verdict == "correct"
    assert is_unharmed()  # nor later


@pytest.mark.parametrize("hostile", [one for one in ESCAPES if one.bites], ids=name)
def test_an_escape_works_where_there_are_no_walls(hostile, scene):
    check, _ = scene
    judgement = judge_program(check(hostile), isolation=NONE, limits=LIMITS)
    assert judgement.verdict == "correct", judgement
    time.sleep(0.3 if "daemon" in hostile.name else 0)


@pytest.mark.parametrize("hostile", [one for one in FAKES if one.bites], ids=name)
def test_a_fake_fools_a_naive_checker_and_not_this_one_even_without_walls(
    hostile, scene, tmp_path
):
    check, _ = scene
    assert naive_verdict(check(hostile), cwd=tmp_path) == "correct"
    judgement = judge_program(check(hostile), isolation=NONE, limits=LIMITS)
    assert judgement.verdict == "wrong", judgement


def test_the_tests_are_behind_walls_as_well(isolation, scene):
    check, _ = scene
    escape = next(one for one in ESCAPES if one.name == "reads_a_file")
    text = check(escape)
    tests = f"{text.program}\nassert f() == {(Path(text.tests)).name!r}\ng()"
    judgement = judge_program(
        Check("def g(): pass", tests, ("g",)), isolation=isolation, limits=LIMITS
    )
    assert judgement.verdict == "wrong"
    assert "FileNotFoundError" in judgement.reason


@pytest.mark.slow
@pytest.mark.parametrize("hostile", [*ESCAPES, *FORGERS, *GLUTTONS, *CONTAINED], ids=name)
def test_a_hostile_program_is_contained_with_a_user_namespace_of_root_too(hostile, scene):
    seen = one_of_each_kind().values()
    rest = [one for one in available_isolations() if one not in seen]
    if not rest:
        pytest.skip("no other isolation works here; only root has two of a kind")
    check, is_unharmed = scene
    limits = SLEEPERS_LIMITS if hostile.sleeps else LIMITS
    for isolation in rest:
        judgement = judge_program(check(hostile), isolation=isolation, limits=limits)
        assert judgement.verdict == hostile.verdict, (isolation, judgement)
        assert is_unharmed()

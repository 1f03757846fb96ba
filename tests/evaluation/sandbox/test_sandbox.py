"""Hostile programs, each judged behind every isolation of this machine, and without any.

Where a kind of isolation is missing, its tests are skipped and say so.
"""

import os
import re
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from dataclasses import replace
from pathlib import Path

import pytest

from hostile_programs import (
    CONTAINED,
    ESCAPES,
    FAKES,
    FORGERS,
    GLUTTONS,
    HAS_PACKAGES_IN_BASE,
    PACKAGES_OF_BASE,
)
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
from loratune.evaluation.sandbox import isolation as isolation_module

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
def outside():
    """A folder that is not under /tmp, where the sandbox's own would hide it, walls or none."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def scene(outside, monkeypatch):
    """What programs are after; gives a function that puts it into their texts, and a check."""
    token = secrets.token_hex(8)
    monkeypatch.setenv("A_SECRET", token)
    folder = outside / "scene"
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
        "INSTALLED": str(Path(pytest.__file__).parents[1]),
        "BASE": str(PACKAGES_OF_BASE),
        "PORT": str(sockets[0].getsockname()[1]),
        "UNIX": str(folder / "socket"),
        "ABSTRACT": abstract,
        "PARENT": str(os.getpid()),
        "BYSTANDER": str(bystander.pid),
        "HOME": str(home),
        "LISTING": repr(sorted(one.name for one in home.iterdir()) if home.is_dir() else None),
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


ALL = (*ESCAPES, *FAKES, *FORGERS, *GLUTTONS, *CONTAINED)
# Whose verdict does not depend on how the walls were made: with the other kind they are slow.
SAME_WITH_BOTH = (*FAKES, *FORGERS, *GLUTTONS)


def cases():
    """Every hostile program behind every kind of walls."""
    for kind in ("bubblewrap", "namespaces"):
        for one in ALL:
            marks = [pytest.mark.slow] if kind == "bubblewrap" and one in SAME_WITH_BOTH else []
            yield pytest.param(kind, one, marks=marks, id=f"{kind}-{one.name}")


@pytest.mark.parametrize(("isolation", "hostile"), list(cases()), indirect=["isolation"])
def test_a_hostile_program_is_contained_and_judged_and_the_next_one_unharmed(
    isolation, hostile, scene
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
def test_a_fake_fools_a_naive_checker_and_not_this_one_even_without_walls(hostile, scene, tmp_path):
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


def test_a_virtual_environments_own_files_are_not_seen(isolation, outside):
    """The judge runs in an environment made here, as in one somewhere in a home folder."""
    folder = outside / "venv"
    venv.create(folder, symlinks=True)
    (installed,) = folder.glob("lib/python*/site-packages")
    for secret in (installed / "secret", installed.parent / "secret", folder / "secret"):
        secret.write_text("secret")
    code = (
        "import sys\nfrom loratune.evaluation.sandbox import *\n"
        f"isolation = Isolation({isolation.kind!r}, {isolation.with_user})\n"
        "for path in sys.argv[1:]:\n"
        "    program = f'def f(): return open({path!r}).read()'\n"
        "    for one in (isolation, Isolation('none')):\n"
        "        check = Check(program, 'assert f() == \"secret\"', ('f',))\n"
        "        judged = judge_program(check, isolation=one)\n"
        "        print(judged.verdict, judged.reason.partition(':')[0])\n"
    )
    secrets_ = [str(one) for one in folder.rglob("secret")]
    assert len(secrets_) == 3
    ours = [str(Path(choosing.__file__).parents[3]), str(Path(pytest.__file__).parents[1])]
    ended = subprocess.run(
        [str(folder / "bin" / "python"), "-c", code, *secrets_],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(ours)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == ["wrong FileNotFoundError", "correct "] * 3


def test_folders_of_installed_packages_are_found_at_any_depth_and_through_links(tmp_path):
    library, elsewhere = tmp_path / "lib", tmp_path / "elsewhere"
    for folder in (
        library / "python3" / "dist-packages" / "a" / "site-packages",  # within one that is covered
        library / "tool" / "venv" / "lib" / "python3.9" / "site-packages",
        library / "kept" / "here",
        elsewhere / "site-packages",
    ):
        folder.mkdir(parents=True)
    (library / "site-packages").symlink_to(library / "kept")
    (library / "linked").symlink_to(elsewhere)
    (library / "dist-packages").write_text("a file")
    found = isolation_module._installed_under(library)  # pyright: ignore[reportPrivateUsage]
    assert {one.relative_to(library).as_posix() for one in found} == {
        "python3/dist-packages",
        "tool/venv/lib/python3.9/site-packages",
        "kept",
    }


@pytest.mark.parametrize("folder_of", ["/usr/lib", "stdlib"])
def test_folders_of_installed_packages_are_there_and_empty(isolation, folder_of):
    """What looks for its neighbours finds nothing, and numpy is where it was."""
    covers = isolation_module._covers()  # pyright: ignore[reportPrivateUsage]
    folder = sysconfig.get_path("stdlib") if folder_of == "stdlib" else folder_of
    chosen = [one for one in covers if one.startswith(folder)]
    if not chosen:
        pytest.skip(f"no packages are installed under {folder}")
    program = (
        "import os, errno\ndef f(folder):\n    found = os.listdir(folder)\n"
        "    try: open(folder + '/x', 'w')\n"
        "    except OSError as error: found.append(error.errno in (errno.EROFS, errno.EACCES))\n"
        "    import numpy\n    return found"
    )
    tests = f"for one in {chosen!r}: assert f(one) == [True]"
    judgement = judge_program(Check(program, tests, ("f",)), isolation=isolation)
    assert judgement.verdict == "correct", judgement


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


def test_at_least_fifty_hostile_programs_are_in_the_list():
    assert len({one.name for one in ALL}) == len(ALL) >= 50


# ---------------------------------------------------------------------------- what programs may


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return [x, (x,), {x: {1.5}}]", "assert f(2) == [2, (2,), {2: {1.5}}]"),
        ("def f(x): return x ** 3000", "assert f(7) == 7 ** 3000"),
        ("def f(x): return -x", "assert f(float('inf')) == float('-inf')"),
        ("def f(x): return x + '\\ud800'", "assert f('\\x00') == '\\x00\\ud800'"),
        ("def f(x): return (n for n in x)", "assert list(f(range(3))) == [0, 1, 2]"),
        ("def f(x): return (n for n in x)", "assert f([1]) != [1]"),
        ("def f(x): return x.keys()", "assert f({'a': 1}) == {'a'}"),
        ("def f(x): x.sort()", "x = [2, 1]\nassert f(x) is None\nassert x == [1, 2]"),
        ("def f(x): x.clear()", "x = {1: 2}\nf(x)\nassert x == {}"),
        ("def f(x): raise ValueError(x)", "try:\n    f('a')\nexcept ValueError as e:\n    "
         "assert str(e) == 'a'\nelse:\n    assert False"),
        ("class E(KeyError): pass\ndef f(x): raise E",
         "try:\n    f(1)\nexcept KeyError:\n    pass"),
        ("import collections\ndef f(x): return collections.Counter(x)",
         "assert f('aa') == {'a': 2}"),
        ("import collections\ndef f(x): return collections.deque(x)", "assert f([1]) != [1]"),
        ("from decimal import Decimal\ndef f(x): return Decimal(x)", "assert f('1.5') == 1.5"),
        ("from fractions import Fraction\ndef f(x): return Fraction(x)", "assert f('1/2') == 0.5"),
        ("import numpy\ndef f(x): return numpy.sum(x)", "assert f([1, 2]) == 3"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
         "def f(x): return A(x).x", "assert f(3) == 3"),
        ("def f(x): return 1 if x < 1 else 1 + f(x - 1)", "assert f(900) == 901"),
        ("import threading\ndef f(x):\n    t = threading.Thread(target=x.append, args=(1,))\n"
         "    t.start(); t.join()\n    return x", "assert f([]) == [1]"),
        ("import asyncio\nasync def g(x): return x\ndef f(x): return asyncio.run(g(x))",
         "assert f(3) == 3"),
        ("import tempfile\ndef f(x):\n    with tempfile.TemporaryFile('w+') as t:\n"
         "        t.write(x); t.seek(0)\n        return t.read()", "assert f('a') == 'a'"),
        ("if __name__ == '__main__':\n    1 / 0\ndef f(x): return x", "assert f(3) == 3"),
    ],
)  # fmt: skip
def test_an_honest_program_is_judged_as_in_its_own_process(program, tests, tmp_path):
    isolation = next(iter(available_isolations()), NONE)
    check = Check(program, tests, ("f",))
    assert judge_program(check, isolation=isolation).verdict == "correct"
    if "__main__" not in program:
        assert naive_verdict(check, cwd=tmp_path) == "correct"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(): return 41", "AssertionError"),
        ("def f(: return 41", "SyntaxError"),
        ("def g(): return 42", "NameError: name 'f' is not defined"),
        ("1 / 0\ndef f(): return 42", "ZeroDivisionError: division by zero"),
        ("f = 42", "TypeError"),
        ("def f(): return 42\nx = '\\0", "SyntaxError"),
        ("", "NameError"),
        ("\0", "null bytes"),
    ],
)
def test_a_wrong_program_gets_its_reason(program, reason):
    judgement = judge_program(Check(program, GOOD.tests, ("f",)), isolation=NONE)
    assert judgement.verdict == "wrong"
    assert reason in judgement.reason


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        # Work in C on what the program gave: no Python signal handler runs meanwhile.
        ("from decimal import Decimal\ndef f(): return Decimal('1e99999999')",
         "assert int(f()) == 42", "exceeded a limit with what the program gave"),
        ("class X:\n    def __bool__(self): return False\ndef f(): return X()",
         "assert f()", "AssertionError"),
        ("class X:\n    def __bool__(self): raise ValueError\ndef f(): return X()",
         "assert f()", "neither true nor false"),
        ("import collections\ndef f(): return collections.deque()",
         "assert f()", "AssertionError"),
        ("import re\ndef f(): return re.search('b', 'abc')",
         "assert not f()", "AssertionError"),
    ],
)  # fmt: skip
def test_what_a_program_gives_costs_itself_the_verdict(program, tests, reason):
    judgement = judge_program(Check(program, tests, ("f",)), isolation=NONE, limits=LIMITS)
    assert judgement.verdict == "wrong"
    assert reason in judgement.reason


def test_what_is_no_plain_data_is_as_true_as_it_was_in_the_program():
    """As in MBPP's own check_str, whose tests look at what `re.search` finds."""
    check = Check(
        "import re\ndef f(text): return re.search('^[aeiou]', text)",
        "assert f('annie')\nassert not f('dawood')\nassert f('else')",
        ("f",),
    )
    assert judge_program(check, isolation=NONE).verdict == "correct"


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (Check(GOOD.program, "assert f( == 42", ("f",)), "the task's own code fails: SyntaxError"),
        (Check(GOOD.program, GOOD.tests, ("f",), setup="1 / 0"), "own code fails: ZeroDivision"),
        (Check(GOOD.program, "pass", ("f",)), "the tests never called the program"),
        (Check(GOOD.program, "f(lambda: 1)", ("f",)), "an argument that is no plain data"),
        (Check(GOOD.program, "f([print])", ("f",)), "an argument that is no plain data"),
    ],
)
def test_tests_that_cannot_judge_are_an_error_and_no_fault_of_the_program(check, reason):
    judgement = judge_program(check, isolation=NONE)
    assert judgement.verdict == "error"
    assert reason in judgement.reason


def test_a_set_in_another_order_gets_the_same_verdict_every_time():
    check = Check("def f(): return list(set('abcdefgh'))", "assert f() == sorted(f())", ("f",))
    verdicts = {judge_program(check, isolation=NONE).verdict for _ in range(4)}
    assert len(verdicts) == 1


def test_judgements_come_in_the_order_of_the_programs_however_long_they_take(isolation):
    slow = Check("import time\ndef f():\n    time.sleep(0.5)\n    return 42", GOOD.tests, ("f",))
    bad = Check("def f(): return 1", GOOD.tests, ("f",))
    judgements = judge_programs([slow, bad, GOOD, bad], isolation=isolation, workers=2)
    assert [one.verdict for one in judgements] == ["correct", "wrong", "correct", "wrong"]
    assert judgements[0].seconds > 0.5


def test_two_programs_at_once_do_not_find_each_other(isolation):
    program = (
        "import os, time\ndef f():\n    open('/tmp/trace', 'w').close()\n    time.sleep(0.5)\n"
        "    return os.listdir('/tmp')"
    )
    check = Check(program, "assert f() == ['trace']", ("f",))
    judgements = judge_programs([check] * 4, isolation=isolation, workers=4)
    assert [one.verdict for one in judgements] == ["correct"] * 4


def test_nothing_runs_on_after_the_verdict(isolation):
    sleeper = Check("import time\ntime.sleep(1e9)", GOOD.tests, ("f",))
    judge_program(sleeper, isolation=isolation, limits=MARKED)
    deadline = time.monotonic() + 5
    while (left := processes_of_the_sandbox()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


# Other tests run at the same time; these processes are known by the number in their limits.
MARKED = replace(SLEEPERS_LIMITS, memory_bytes=(1 << 28) + os.getpid())


def processes_of_the_sandbox():
    """The command lines of all processes, also those that lost their parent, with our mark."""
    found = []
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = one.read_text()
        except OSError:
            continue
        if f'"memory_bytes": {MARKED.memory_bytes}' in command:
            found.append(command)
    return found


def test_killing_the_checker_kills_the_program(isolation):
    """A checker that is killed cannot clean up; what it started has to notice by itself."""
    code = (
        "from loratune.evaluation.sandbox import *\n"
        "check = Check('import time\\ntime.sleep(1e9)', 'f()', ('f',))\n"
        f"isolation = Isolation({isolation.kind!r}, {isolation.with_user})\n"
        f"limits = Limits(memory_bytes={MARKED.memory_bytes})\n"
        "judge_program(check, isolation=isolation, limits=limits)"
    )
    checker = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while len(processes_of_the_sandbox()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # they have started, and are behind their walls
        assert len(processes_of_the_sandbox()) >= 2
    finally:
        checker.kill()
        checker.wait()
    while (left := processes_of_the_sandbox()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_a_process_that_cannot_be_started_is_an_error_with_its_reason(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    judgement = judge_program(GOOD, isolation=NONE)
    assert judgement.verdict == "error"
    assert judgement.reason == "the sandbox did not start: no more processes"


# ---------------------------------------------------------------------------- the choice


@pytest.fixture
def no_isolation(monkeypatch):
    reasons = (
        (Isolation("bubblewrap", with_user=True), "no such program"),
        (Isolation("namespaces", with_user=True), "Operation not permitted"),
    )
    monkeypatch.setattr(choosing, "trials", lambda: reasons)


@pytest.mark.usefixtures("no_isolation")
def test_without_isolation_generated_code_is_refused_with_the_reasons_and_the_ways_out():
    with pytest.raises(EvaluationError) as raised:
        choose_isolation()
    text = str(raised.value)
    for part in ("is not run", "bubblewrap", "--unsafe-exec", "no such program", "not permitted"):
        assert part in text


@pytest.mark.usefixtures("no_isolation")
def test_without_isolation_generated_code_runs_where_the_danger_is_accepted():
    assert choose_isolation(unsafe_exec=True) == NONE


def test_accepting_the_danger_does_not_switch_off_what_works(isolation):
    assert choose_isolation(unsafe_exec=True) == choose_isolation() != NONE


def test_bubblewrap_that_is_not_installed_is_passed_over(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    choosing.trials.cache_clear()
    try:
        reasons = {one.kind: reason for one, reason in choosing.trials()}
        assert "bwrap" in reasons["bubblewrap"]
        assert all(one.kind == "namespaces" for one in available_isolations())
    finally:
        choosing.trials.cache_clear()


def test_walls_with_a_hole_are_not_chosen(monkeypatch):
    """The probe is what decides: here the walls are put up around nothing."""
    monkeypatch.setattr(
        choosing, "judge_program", lambda check, **_: judge_program(check, isolation=NONE)
    )
    choosing.trials.cache_clear()
    try:
        assert available_isolations() == ()
        reason = dict(choosing.trials())[Isolation("namespaces", with_user=True)]
        assert "reads a file" in reason
        assert "finds installed packages" in reason
    finally:
        choosing.trials.cache_clear()


@pytest.mark.skipif(not HAS_PACKAGES_IN_BASE, reason="the base installation has no packages")
@pytest.mark.usefixtures("isolation")
def test_walls_that_show_installed_packages_are_not_chosen(monkeypatch):
    monkeypatch.setattr(isolation_module, "_covers", list)
    choosing.trials.cache_clear()
    try:
        assert available_isolations() == ()
        assert any("it ['finds installed packages']" in reason for _, reason in choosing.trials())
    finally:
        choosing.trials.cache_clear()

"""Programs that mean harm, or cheat, each with what must become of it.

Every program defines `f`, and its tests call `f`. Words between @ are replaced by what the test
that runs them has laid out: @SECRET@ (a file whose content is @TOKEN@), @VICTIM@ (a file), @OUTSIDE@ (a
path that can be written), @INSTALLED@ and @BASE@ (folders of installed packages: this
environment's, and those of the Python that it was made of), @PORT@, @UNIX@ and @ABSTRACT@ (listening sockets), @PARENT@ (the checker's
process), @BYSTANDER@ (another process).

- An ESCAPE tries something, and its tests pass only if it worked: `wrong` behind walls, and
  `correct` without, where it does no lasting harm, so that each is known to bite.
- A FAKE does not do its task; a naive checker, which runs program and tests in one process, takes
  it for correct.
- A GLUTTON takes all it can get of something; it only ever runs under limits.
- CONTAINED ones try, fail, and do their task after all: `correct` behind walls. What they try would
  harm without walls.
"""

# Programs stand as they are run, however long their lines.
# ruff: noqa: E501

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

IS_ROOT = os.geteuid() == 0
_STATUS = Path("/proc/self/status").read_text()
_CAPABILITIES = int(_STATUS.partition("CapEff:")[2].split()[0], 16)


def _has(capability):
    """Whether this process has it; root may lack some."""
    return bool(_CAPABILITIES >> capability & 1)


CHROOT, TRACE, NICE, RESOURCE = 18, 19, 23, 24  # linux/capability.h
_BASE = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
PACKAGES_OF_BASE = Path(sysconfig.get_path("purelib", vars=_BASE))
HAS_PACKAGES_IN_BASE = PACKAGES_OF_BASE.is_dir() and any(PACKAGES_OF_BASE.iterdir())
HAS_HOME = Path.home().is_dir() and len(list(Path.home().iterdir())) > 1


@dataclass(frozen=True)
class Hostile:
    name: str
    program: str
    tests: str
    verdict: str = "wrong"
    bites: bool = True  # whether it works without walls (escapes) or on a naive checker (fakes)
    sleeps: bool = False  # so that only the wall time ends it


def _escape(name, expression, expected="'done'", *, before="", bites=True):
    program = (
        f"import os, socket, ctypes, signal, sys\n{before}\ndef f():\n    return {expression}\n"
    )
    return Hostile(name, program, f"assert f() == {expected}", bites=bites)


def _done(code):
    """An expression that runs statements and gives 'done'."""
    return f"exec({code!r}, globals()) or 'done'"


# Run with ctypes: the answer of a system call that Python has no function for.
_LIBC = "libc = ctypes.CDLL(None, use_errno=True)"

ESCAPES = (
    _escape("reads_a_file", "open('@SECRET@').read()", "'@TOKEN@'"),
    _escape("lists_a_folder", "os.listdir(os.path.dirname('@SECRET@')) != []", "True"),
    _escape(
        "reads_through_a_symlink", "os.symlink('@SECRET@', 'x') or open('x').read()", "'@TOKEN@'"
    ),
    _escape(
        "reads_through_a_hard_link", "os.link('@SECRET@', 'x') or open('x').read()", "'@TOKEN@'"
    ),
    _escape("climbs_out_of_its_folder", "open('../' * 30 + '@SECRET@').read()", "'@TOKEN@'"),
    _escape("lists_installed_packages", "os.listdir('@INSTALLED@') != []", "True"),
    _escape(
        "reads_an_installed_package", "open('@INSTALLED@/pytest/__init__.py').read() != ''", "True"
    ),
    _escape(
        "imports_an_installed_package",
        "__import__('iniconfig').__name__",
        "'iniconfig'",
        before="sys.path.append('@INSTALLED@')",
    ),
    _escape(
        "lists_the_base_installations_packages",
        "os.listdir('@BASE@') != []",
        "True",
        bites=HAS_PACKAGES_IN_BASE,
    ),
    _escape("reads_the_users", "'root' in open('/etc/passwd').read()", "True"),
    _escape("reads_the_passwords", "open('/etc/shadow').read() != ''", "True", bites=IS_ROOT),
    _escape("lists_the_home_folder", "sorted(os.listdir('@HOME@'))", "@LISTING@", bites=HAS_HOME),
    _escape("reads_the_parents_environment", "open('/proc/@PARENT@/environ').read() != ''", "True"),
    _escape("reads_the_parents_command", "open('/proc/@PARENT@/cmdline').read() != ''", "True"),
    _escape("reads_the_parents_map", "open('/proc/@PARENT@/maps').read() != ''", "True"),
    _escape("lists_processes", "'@PARENT@' in os.listdir('/proc')", "True"),
    _escape("reopens_a_descriptor", "open('/proc/self/fd/0').read()", "''"),
    _escape("looks_at_devices", "os.path.exists('/sys') or os.path.exists('/dev/tty')", "True"),
    _escape("writes_a_file", _done("open('@OUTSIDE@', 'w').close()")),
    _escape("makes_a_folder", _done("os.mkdir('@OUTSIDE@')")),
    _escape("makes_a_symlink", _done("os.symlink('/', '@OUTSIDE@')")),
    _escape("deletes_a_file", _done("os.remove('@VICTIM@')")),
    _escape("renames_a_file", _done("os.rename('@VICTIM@', '@VICTIM@2')")),
    _escape("truncates_a_file", _done("os.truncate('@VICTIM@', 0)")),
    _escape("opens_a_file_to_all", _done("os.chmod('@VICTIM@', 0o777)")),
    _escape("changes_a_files_time", _done("os.utime('@VICTIM@', (1, 1))")),
    _escape(
        "opens_the_library_for_writing",
        _done("open(os.__file__, 'a').close()"),
        bites=os.access(os.__file__, os.W_OK),
    ),
    _escape(
        "connects_by_tcp", "socket.create_connection(('127.0.0.1', @PORT@)).recv(5)", "b'hello'"
    ),
    _escape(
        "listens_on_tcp", "socket.create_server(('127.0.0.1', 0)).getsockname()[1] > 0", "True"
    ),
    _escape(
        "sends_by_udp",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "1",
    ),
    _escape(
        "connects_to_a_unix_socket",
        "(s := socket.socket(socket.AF_UNIX)).connect('@UNIX@') or s.recv(5)",
        "b'hello'",
    ),
    _escape(
        "connects_to_an_abstract_socket",
        "(s := socket.socket(socket.AF_UNIX)).connect('\\0@ABSTRACT@') or s.recv(5)",
        "b'hello'",
    ),
    _escape(
        "asks_the_kernel_by_netlink",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).fileno() > 0",
        "True",
    ),
    _escape("resolves_a_name", "socket.getaddrinfo('localhost', 80) != []", "True"),
    _escape("signals_the_parent", "os.kill(@PARENT@, 0) or 'done'"),
    _escape("kills_a_bystander", "os.kill(@BYSTANDER@, signal.SIGKILL) or 'done'"),
    _escape(
        "traces_a_bystander",  # PTRACE_SEIZE
        "libc.ptrace(0x4206, @BYSTANDER@, None, None)",
        "0",
        before=_LIBC,
        bites=_has(TRACE),
    ),
    _escape("starts_a_shell", "os.system('true')", "0"),
    _escape(
        "starts_a_program", "__import__('subprocess').run([sys.executable, '-V']).returncode", "0"
    ),
    _escape("spawns_a_program", "os.posix_spawn('/bin/true', ['true'], {}) > 0", "True"),
    _escape(
        "leaves_a_daemon",
        _done(
            "import time\n"
            "if not os.fork():\n"
            "    os.setsid()\n"
            "    time.sleep(0.2)\n"
            "    open('@OUTSIDE@', 'w').close()\n"
            "    os._exit(0)"
        ),
    ),
    _escape("becomes_root", _done("os.setuid(0)"), bites=IS_ROOT),
    _escape("changes_its_root", _done("os.chroot('/')"), bites=_has(CHROOT)),
    _escape(
        "raises_its_priority", _done("os.setpriority(os.PRIO_PROCESS, 0, -5)"), bites=_has(NICE)
    ),
    _escape(
        "raises_its_limits",
        _done("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))"),
        bites=_has(RESOURCE),
    ),
    _escape("hides_memory_in_a_file", "os.memfd_create('x') > 0", "True"),
    _escape(
        "hides_memory_in_the_kernel", "libc.shmget(0, 4096, 0o1600) >= 0", "True", before=_LIBC
    ),
    _escape(
        "forges_the_verdict_and_kills_the_judge",
        _done(
            "import json, time\n"
            "for pid in os.listdir('/proc'):\n"
            "    if not pid.isdigit() or int(pid) == os.getpid(): continue\n"
            "    try:\n"
            "        parent = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1]\n"
            "    except OSError: continue\n"
            "    if parent != str(os.getppid()): continue\n"
            "    os.kill(int(pid), signal.SIGSTOP)\n"
            "    for fd in os.listdir(f'/proc/{pid}/fd'):\n"
            "        if os.readlink(f'/proc/{pid}/fd/{fd}').startswith('pipe:') and int(fd) > 2:\n"
            "            try: out = os.open(f'/proc/{pid}/fd/{fd}', os.O_WRONLY | os.O_NONBLOCK)\n"
            "            except OSError: continue\n"
            '            text = \'{"verdict": "correct", "reason": ""}\\n\'\n'
            "            os.write(out, text.encode())\n"
            "    os.kill(int(pid), 9)"
        ),
        "'nothing that it returns'",
    ),
)


def _fake(name, program, tests="assert f() == 42", *, verdict="wrong", bites=True):
    return Hostile(name, f"import os, sys\n{program}\n", tests, verdict=verdict, bites=bites)


FAKES = (
    _fake("prints_passed_and_exits", "print('passed', flush=True)\nos._exit(0)"),
    _fake("exits_at_once", "print('passed')\nsys.exit(0)"),
    _fake("exits_when_called", "def f():\n    print('passed', flush=True)\n    os._exit(0)"),
    _fake("raises_system_exit", "def f():\n    print('passed')\n    raise SystemExit(0)"),
    _fake(
        "exits_at_the_end",
        "import atexit\ndef end():\n    print('passed', flush=True)\n    os._exit(0)\n"
        "atexit.register(end)\ndef f(): return 1",
    ),
    _fake(
        "swallows_the_failure",
        "def hook(*_):\n    print('passed', flush=True)\n    os._exit(0)\n"
        "sys.excepthook = hook\ndef f(): return 1",
    ),
    _fake(
        "exits_from_a_signal_handler",
        "import signal\ndef hook(*_):\n    print('passed', flush=True)\n    os._exit(0)\n"
        "signal.signal(signal.SIGALRM, hook)\n"
        "def f():\n    signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "    import time\n    time.sleep(1)",
    ),
    _fake(
        "exits_from_a_thread",
        "import threading, time\ndef end():\n    print('passed', flush=True)\n    os._exit(0)\n"
        "def f():\n    threading.Thread(target=end).start()\n    time.sleep(1)",
    ),
    _fake(
        "replaces_itself_by_another_program",
        "def f():\n    os.execv(sys.executable, [sys.executable, '-c', 'print(\"passed\")'])",
    ),
    _fake(
        "equals_everything",
        "class Yes:\n    def __eq__(self, other): return True\ndef f(): return Yes()",
    ),
    _fake(
        "is_a_number_that_equals_everything",
        "class Yes(int):\n    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\ndef f(): return Yes(1)",
    ),
    _fake(
        "is_a_text_that_equals_everything",
        "class Yes(str):\n    def __eq__(self, other): return True\n"
        "    __hash__ = str.__hash__\ndef f(): return Yes('no')",
        "assert f() == 'yes'",
    ),
    _fake(
        "lies_about_its_class",
        "class Yes:\n    __class__ = int\n    def __eq__(self, other): return True\n"
        "def f(): return Yes()",
    ),
    _fake(
        "holds_what_equals_everything",
        "class Yes:\n    def __eq__(self, other): return True\ndef f(): return [Yes(), Yes()]",
        "assert f() == [1, 2]",
    ),
    _fake(
        "replaces_builtins",
        "import builtins\nbuiltins.set = lambda _: 1\ndef f(): return [1]",
        "assert set(f()) == set([1, 2])",
    ),
    _fake(
        "defines_the_tests_helpers",
        "def sorted(_): return 1\ndef f(): return [1]",
        "assert sorted(f()) == sorted([3, 4])",
    ),
    _fake(
        "replaces_a_module",
        "import math\nmath.isclose = lambda *_: True\ndef f(): return 1.0",
        "import math\nassert math.isclose(f(), 3.0)",
    ),
    _fake(
        "replaces_a_module_in_the_list_of_modules",
        "import types\nfake = types.ModuleType('math')\nfake.isclose = lambda *_: True\n"
        "sys.modules['math'] = fake\ndef f(): return 1.0",
        "import math\nassert math.isclose(f(), 3.0)",
    ),
    _fake(
        "hooks_the_import",
        "class Fake:\n    @staticmethod\n    def find_spec(name, *_):\n"
        "        if name == 'fractions':\n"
        "            sys.modules['cheat'] = 1\n            return None\n"
        "sys.meta_path.insert(0, Fake)\n"
        "def f(): return 42 if 'cheat' in sys.modules else 1",
        "import fractions\nassert f() == 42",
    ),
    _fake(
        "reads_the_answer_from_the_callers_frame",
        "def f(): return sys._getframe(1).f_globals['expected']",
        "expected = 42\nassert f() == expected",
    ),
    _fake(
        "changes_the_answer_in_the_callers_frame",
        "def f():\n    sys._getframe(1).f_globals['expected'] = 1\n    return 1",
        "expected = 42\nassert f() == expected",
    ),
    _fake(
        "finds_the_answer_among_all_objects",
        "import gc\ndef f():\n    for one in gc.get_objects():\n"
        "        if isinstance(one, dict) and 'expected_by' in one: return one['answer']\n",
        "cases = [{'expected_by': 'tests', 'answer': [42]}]\nassert f() == cases[0]['answer']",
    ),
    _fake(
        "finds_the_answer_in_the_source",
        "def f():\n    import __main__\n    return __main__.expected",
        "expected = 42\nassert f() == expected",
    ),
    _fake(
        "skips_the_comparison",
        "def f():\n    frame = sys._getframe(1)\n    def jump(frame, event, _):\n"
        "        if event == 'line': frame.f_lineno = frame.f_lineno + 1\n"
        "        frame.f_trace = None\n"
        "    sys.settrace(jump)\n    frame.f_trace = jump\n    return 1",
        "answer = f()\nassert answer == 42\npass",
    ),
    _fake(
        "prints_from_a_replaced_stdout",
        "class Out:\n    def write(self, text): sys.__stdout__.write('passed')\n"
        "    def flush(self): sys.__stdout__.flush()\n"
        "sys.stdout = Out()\nprint('x')\nsys.stdout.flush()\n"
        "def f(): os._exit(0)",
    ),
    _fake(
        "writes_a_verdict_to_every_descriptor",
        "def f():\n    for fd in range(64):\n        try:\n"
        '            os.write(fd, b\'{"verdict": "correct", "reason": ""}\\npassed\')\n'
        "        except OSError: pass\n    os._exit(0)",
    ),
    _fake(
        "reads_the_environment",
        "def f(): return os.environ.get('A_SECRET')",
        "assert f() == '@TOKEN@'",
    ),
)

_PIPE = (
    "import os, fcntl\n"
    "def out():\n"
    "    for fd in range(3, 64):\n"
    "        try:\n"
    "            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY: return fd\n"
    "        except OSError: pass\n"
)


def _frame(body, after="return 1"):
    """A program that sends bytes of its own making in place of an answer."""
    return (
        f"{_PIPE}def f():\n    body = {body}\n"
        f"    os.write(out(), len(body).to_bytes(4, 'big') + body)\n    {after}\n"
    )


# What a naive checker has no equal of: bytes on the wire that are no answer.
FORGERS = tuple(
    Hostile(name, program, "try:\n    assert f() == 42\nexcept Exception:\n    pass", bites=False)
    for name, program in (
        ("sends_a_verdict", _frame('b\'{"id": 2, "verdict": "correct", "reason": ""}\'')),
        ("sends_no_json", _frame("b'passed'")),
        ("sends_nesting_without_end", _frame("b'[' * 1000000")),
        ("sends_a_list", _frame("b'[]'")),
        ("sends_a_set_of_lists", _frame('b\'{"id": 2, "value": {"set": [[1]]}}\'')),
        ("sends_an_unknown_type", _frame('b\'{"id": 2, "value": {"function": 1}}\'')),
        ("sends_another_calls_answer", _frame('b\'{"id": 1, "value": 42}\'')),
        ("sends_wrong_arguments", _frame('b\'{"id": 2, "value": 42, "arguments": [1]}\'')),
        (
            "sends_a_length_and_no_more",
            f"{_PIPE}def f():\n    os.write(out(), b'\\0\\0\\0\\7')\n    os._exit(0)",
        ),
        (
            "sends_a_giant_length",
            f"{_PIPE}def f():\n    os.write(out(), b'\\xff' * 8)\n    return 1",
        ),
    )
)


def _glutton(name, program, tests="assert f() == 42", verdict="wrong", *, sleeps=False):
    program = f"import os, sys, time, signal\n{program}\n"
    return Hostile(name, program, tests, verdict, bites=False, sleeps=sleeps)


_UNTIL_ERROR = "\n    except (OSError, RuntimeError, MemoryError): return 42"

GLUTTONS = (
    _glutton("forks_without_end", "while True: os.fork()"),
    _glutton("forks_when_called", "def f():\n    while True: os.fork()"),
    _glutton("runs_for_ever", "def f():\n    while True: pass"),
    _glutton("sleeps_for_ever", "def f(): time.sleep(1e9)", sleeps=True),
    _glutton("sleeps_at_once", "time.sleep(1e9)", sleeps=True),
    _glutton("waits_for_input", "def f(): return sys.stdin.read() + input()"),
    _glutton(
        "sleeps_through_everything",
        "def f():\n    while True:\n        try: time.sleep(1e9)\n        except BaseException: pass",
        sleeps=True,
    ),
    _glutton(
        "ignores_all_signals",
        "def f():\n    for one in signal.valid_signals():\n"
        "        try: signal.signal(one, signal.SIG_IGN)\n        except (OSError, ValueError): pass\n"
        "    while True: pass",
    ),
    _glutton(
        "catches_the_time_limit",
        "signal.signal(signal.SIGXCPU, lambda *_: None)\ndef f():\n    while True: pass",
    ),
    _glutton(
        "stops_itself",
        "def f(): os.kill(os.getpid(), signal.SIGSTOP); time.sleep(1e9)",
        sleeps=True,
    ),
    _glutton("kills_itself", "def f(): signal.raise_signal(signal.SIGKILL); os.abort()"),
    _glutton("crashes", "import ctypes\ndef f(): return ctypes.string_at(0)"),
    _glutton("prints_without_end", "def f():\n    while True: print('x' * 1000000)"),
    _glutton(
        "prints_to_stderr_without_end", "def f():\n    while True: os.write(2, b'x' * 1000000)"
    ),
    _glutton("answers_without_end", "def f(): return 'x' * (1 << 25)"),
    _glutton(
        "yields_without_end", "import itertools\ndef f(): return itertools.count()", "list(f())"
    ),
    _glutton(
        "takes_all_memory",
        "def f():\n    x = [bytearray(1 << 20)]\n    while True: x += [x[0] * 2]",
    ),
    _glutton("takes_all_memory_at_once", "def f(): return len(b'x' * (1 << 40))"),
    _glutton("reads_a_device_without_end", "def f(): return open('/dev/zero', 'rb').read()"),
    _glutton("calls_itself_without_end", "def f(): return f()"),
    _glutton(
        "overflows_the_stack",
        "sys.setrecursionlimit(1 << 30)\nclass A:\n    def __repr__(self): return repr(self)\n"
        "def f(): return repr(A())",
    ),
    _glutton("matches_without_end", "import re\ndef f(): return re.match('(a+)+b', 'a' * 60)"),
    # These come to their limit and go on.
    _glutton(
        "takes_memory_until_it_is_refused",
        f"def f():\n    x = []\n    try:\n        while True: x.append(bytearray(1 << 24)){_UNTIL_ERROR}",
        verdict="correct",
    ),
    _glutton(
        "writes_a_huge_file",
        "def f():\n    try:\n        with open('x', 'wb', 0) as out:\n"
        f"            while True: out.write(bytes(1 << 20)){_UNTIL_ERROR}",
        verdict="correct",
    ),
    _glutton(
        "fills_the_folder",
        "def f():\n    try:\n        for n in range(1000):\n"
        f"            with open(str(n), 'wb', 0) as out: out.write(bytes(1 << 20)){_UNTIL_ERROR}",
        verdict="correct",
    ),
    _glutton(
        "makes_files_without_end",
        f"def f():\n    try:\n        for n in range(100000): open(str(n), 'w').close(){_UNTIL_ERROR}",
        verdict="correct",
    ),
    _glutton(
        "opens_files_without_end",
        f"def f():\n    x = []\n    try:\n        for _ in range(10000): x.append(open('/dev/null')){_UNTIL_ERROR}",
        verdict="correct",
    ),
    _glutton(
        "starts_threads_without_end",
        "import threading\nthreading.stack_size(1 << 16)\ndef f():\n    try:\n"
        "        for _ in range(1000):\n"
        f"            threading.Thread(target=time.sleep, args=(9,), daemon=True).start(){_UNTIL_ERROR}",
        verdict="correct",
    ),
)


def _contained(name, attempt, before=""):
    program = (
        f"import os, signal, ctypes\n{before}\ndef f():\n    try:\n        worked = {attempt}\n"
        "    except (OSError, PermissionError): worked = False\n"
        "    return 1 if worked else 42\n"
    )
    return Hostile(name, program, "assert f() == 42", "correct", bites=False)


CONTAINED = (
    _contained("kills_everybody", "os.kill(-1, signal.SIGKILL)"),
    _contained("kills_the_first_process", "os.kill(1, signal.SIGKILL)"),
    _contained("stops_the_first_process", "os.kill(1, signal.SIGSTOP)"),
    _contained("kills_its_group", "os.killpg(0, signal.SIGCONT)"),
    _contained("shares_a_process_group", "os.getpgrp() != os.getpid()"),
    _contained("mounts", "libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0", _LIBC),
    _contained("unmounts", "libc.umount2(b'/tmp', 2) == 0", _LIBC),
    _contained("makes_a_user_namespace", "libc.unshare(0x10000000) == 0", _LIBC),
    _contained("makes_a_device", "os.mknod('x', 0o60666, os.makedev(254, 0)) or True"),
    _contained("removes_the_library", "os.remove(os.__file__) or True"),
    _contained("removes_the_device", "os.remove('/dev/null') or True"),
    _contained("sets_the_clock", "__import__('time').clock_settime(0, 0) or True"),
    _contained("renames_the_machine", "__import__('socket').sethostname('x') or True"),
    _contained("survives_its_parent", "libc.prctl(1, 0, 0, 0, 0) and True", _LIBC),
    _contained(
        "keeps_more_descriptors_than_its_pipes",
        "len([fd for fd in range(64) if is_open(fd)]) > 5",
        "def is_open(fd):\n    try: os.fstat(fd)\n    except OSError: return False\n    return True",
    ),
    _contained(
        "finds_more_in_its_environment",
        "set(os.environ) - {'PYTHONHASHSEED', 'LC_ALL', 'HOME', 'TMPDIR', 'OPENBLAS_NUM_THREADS', "
        "'OMP_NUM_THREADS', 'PWD', 'LC_CTYPE'}",
    ),
    _contained("finds_something_in_its_folder", "os.listdir('.') or os.listdir('/tmp')"),
    _contained("finds_more_at_the_root", "set(os.listdir('/')) & {'proc', 'sys', 'run', 'boot'}"),
    _contained("has_capabilities", "libc.prctl(23, 21, 0, 0, 0) == 1", _LIBC),  # CAPBSET_READ
    _contained("can_gain_privileges", "libc.prctl(39, 0, 0, 0, 0) != 1", _LIBC),
)

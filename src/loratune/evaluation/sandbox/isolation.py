"""The command that starts a process of the sandbox, by each kind of isolation.

What is seen inside, read-only: the Python interpreter with its standard library and the `lib`
folder that holds it, the system's shared libraries with all else in their folders, the packages
named in `PACKAGES`, the guest's own code, four devices. Of a virtual environment nothing is seen
but those packages, and an empty folder lies over every folder of installed packages (`_covers`).
There is no /proc, and nothing of /etc, /var or /sys, nor of the home folder, unless the interpreter
is installed there.
"""

import compileall
import importlib.util
import json
import os
import random
import shutil
import sys
import sysconfig
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from loratune.evaluation.sandbox.guest import DEVICES, USER_INSIDE, WORK_FOLDER

# Generated programs import it now and then, and HumanEval's own harness has it installed.
PACKAGES = ("numpy",)

_SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_LOADER_CACHE = "/etc/ld.so.cache"
_GUEST = Path(__file__).parent / "guest"
_GUEST_INSIDE, _PACKAGES_INSIDE = "/sandbox", "/packages"
# What installers call the folders that they put packages into. Such a folder may hold anybody's
# code and data, and lies within the standard library, or under /usr/lib, which are bound.
_INSTALLED = ("site-packages", "dist-packages")
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from guest.enter import main; main(sys.argv[2])"
)
# Numbers of users that no system gives out: above those of systemd's dynamic users and containers.
_FIRST_UNUSED_USER, _NUM_UNUSED_USERS = 2_000_000_000, 100_000_000

# All that a program finds in its environment. The hash seed is fixed, so that a program that
# depends on the order of a set gets the same verdict every time.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LC_ALL": "C.UTF-8",
    "HOME": WORK_FOLDER,
    "TMPDIR": WORK_FOLDER,
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Isolation:
    """How generated code is kept apart.

    `with_user`: a user namespace is made, too; root can do without. `none` has only the limits on
    memory, CPU time, files and wall time.
    """

    kind: Literal["bubblewrap", "namespaces", "none"]
    with_user: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What one process of the sandbox may use; the program and its tests are one process each.

    CPU time is what judges a program that is too slow, because neighbours on the machine do not
    move it; `wall_seconds` is for those that sleep. `file_bytes` holds for one file and for the
    whole folder.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 24


def sandbox_command(
    isolation: Isolation,
    *,
    role: Literal["program", "tests"],
    fds: tuple[int, int],
    limits: Limits,
) -> list[str]:
    """The arguments that start a process of the sandbox, with nothing in its environment.

    Args:
        isolation: how it is kept apart.
        role: what it becomes.
        fds: the ends of its pipes, which it inherits: requests, then replies.
        limits: what it may use.

    Raises:
        FileNotFoundError: bubblewrap is not installed.
    """
    _compile_guest()
    isolated = isolation.kind != "none"
    inside = isolation.kind == "bubblewrap"
    packages = sorted({str(path.parent) for path in _packages()})
    guest_path = _GUEST_INSIDE if inside else str(_GUEST.parent)
    # Not a secret: only that two programs should not be the same user.
    user = _FIRST_UNUSED_USER + random.SystemRandom().randrange(_NUM_UNUSED_USERS)
    caps = {key: value for key, value in asdict(limits).items() if key != "wall_seconds"}
    options = {
        "role": role,
        "fds": fds,
        "limits": caps,
        "isolated": isolated,
        "enter_namespaces": isolation.kind == "namespaces",
        "with_user": isolation.with_user,
        "binds": _binds() if isolation.kind == "namespaces" else [],
        "covers": _covers() if isolation.kind == "namespaces" else [],
        "guest_path": guest_path,
        "package_paths": [_PACKAGES_INSIDE] if isolated else packages,
        "user": user,
        "is_root_outside": os.geteuid() == 0,
    }
    # -S: no site-packages. -P, -s: nothing from the working folder or the home folder.
    python = [str(_interpreter()), "-s", "-P", "-S", "-B", "-c", _START, guest_path]
    command = [*python, json.dumps(options)]
    return [*_bubblewrap(isolation), *command] if inside else command


def _bubblewrap(isolation: Isolation) -> list[str]:
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise FileNotFoundError("bubblewrap (bwrap) is not installed")
    command = [bubblewrap, "--die-with-parent", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try"]
    if isolation.with_user:
        command += ["--unshare-user", "--uid", str(USER_INSIDE), "--gid", str(USER_INSIDE)]
    # The guest needs them to mount its folder and to become another user, and then drops them.
    for capability in ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP"):
        command += ["--cap-add", f"CAP_{capability}"]
    binds = [("--ro-bind", source, target) for source, target in _binds()]
    binds += [("--dev-bind", device, device) for device in DEVICES]
    for option, source, target in binds:
        # Left to itself, bubblewrap makes folders on the way that root alone can enter.
        for parent in reversed(Path(target).parents[:-1]):
            command += ["--dir", str(parent)]
        command += [option, source, target]
    for folder in _covers():
        # Read-only: what could be written here would be limited by nothing.
        command += ["--tmpfs", folder, "--remount-ro", folder]
    return [*command, "--dir", WORK_FOLDER, "--remount-ro", "/", "--chdir", "/", "--"]


@cache
def _compile_guest() -> None:
    """Leave the guest's bytecode beside it, as an import would, where that can be written.

    Inside it cannot, and every program would wait for its compilation.
    """
    if not sys.dont_write_bytecode:
        compileall.compile_dir(_GUEST, quiet=2)


@cache
def _binds() -> list[tuple[str, str]]:
    """(path outside, path inside) of all that the sandbox can read."""
    library = Path(sys.base_prefix).resolve() / "lib"
    same = [_interpreter(), *(Path(one) for one in (*_SHARED_LIBRARIES, _LOADER_CACHE))]
    # A virtual environment has no standard library. What it calls its platstdlib is its own folder
    # of packages and all that lies beside them: the true one is the base installation's.
    bases = {"installed_base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    for one in ("stdlib", "platstdlib"):
        same.append(Path(sysconfig.get_path(one, vars=bases)).resolve())
    if library != Path("/lib"):
        same.append(library)  # libpython, and what its modules are linked with
    chosen: list[Path] = []
    for one in same:
        if one.exists() and not any(one.is_relative_to(other) for other in chosen):
            chosen.append(one)
    binds = [(str(one.resolve()), str(one)) for one in chosen]
    binds += [(str(one), f"{_PACKAGES_INSIDE}/{one.name}") for one in _packages()]
    return [*binds, (str(_GUEST), f"{_GUEST_INSIDE}/{_GUEST.name}")]


@cache
def _covers() -> list[str]:
    """Paths inside, each of a folder of installed packages that an empty one is laid over.

    All that is bound is searched, once: /usr/lib alone may hold programs' own environments.
    """
    folders = {found for source, _ in _binds() for found in _installed_under(Path(source))}
    inside = {
        str(Path(target) / folder.relative_to(source))
        for folder in folders
        for source, target in _binds()
        if folder.is_relative_to(source)
    }
    return sorted(inside)


def _installed_under(folder: Path) -> list[Path]:
    """The folders of installed packages at any depth under `folder`, links to them followed."""
    found: list[Path] = []
    waiting = [str(folder)] if folder.is_dir() else []
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:  # what cannot be read here cannot be read inside
            continue
        for entry in entries:
            is_installed = entry.name in _INSTALLED
            if entry.is_dir(follow_symlinks=is_installed):
                if is_installed:
                    found.append(Path(entry.path).resolve())
                else:
                    waiting.append(entry.path)
    return found


@cache
def _packages() -> list[Path]:
    """The folders of `PACKAGES`, and those of the shared libraries in their wheels."""
    folders: list[Path] = []
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        for one in (found.submodule_search_locations or []) if found else []:
            folder = Path(one).resolve()
            folders += [folder, folder.with_name(f"{name}.libs")]
    return [one for one in folders if one.is_dir()]


def _interpreter() -> Path:
    """The interpreter itself, not a virtual environment's link to it."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()

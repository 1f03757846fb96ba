"""The walls, put up by the process that is to live behind them, before it reads the program.

`enter_namespaces` is for machines without bubblewrap, which does the same from outside. What
follows is the same in both: an empty folder, no privileges, limits, the filter of system calls.

User namespaces: user_namespaces(7). The order of steps follows bubblewrap's, whose documentation
explains it.
"""

# Every program waits for these imports, and pathlib's take longer than all others together.
# ruff: noqa: PTH103, PTH112, PTH120, PTH123

import ctypes
import os
import resource
import signal
import struct
import sys
from typing import NoReturn

from . import DEVICES, USER_INSIDE, WORK_FOLDER, seccomp

_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522

_MOST_PROCESSES = 32
_MOST_OPEN_FILES = 64
_MOST_FILES = 1024

_libc = ctypes.CDLL(None, use_errno=True)


def enter_namespaces(
    binds: list[tuple[str, str]],
    *,
    covers: list[str],
    with_user: bool,
    pass_fds: tuple[int, ...],
) -> None:
    """Return in a process of its own namespaces, whose root folder holds `binds` and devices alone.

    Three processes: this one waits outside; the first of the new process namespace waits inside, so
    that all in there ends with it, and it ends with this one; the third returns.

    Args:
        binds: what is seen inside, read-only: (path outside, path inside).
        covers: folders inside, within what is bound, that are seen as empty ones.
        with_user: make a user namespace, too; needed by everyone but root.
        pass_fds: what the third process alone keeps open.

    Raises:
        OSError: the kernel refuses a step.
    """
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    _call("unshare", flags | _CLONE_NEWCGROUP | (_CLONE_NEWUSER if with_user else 0))
    if with_user:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{USER_INSIDE} {user} 1")
        _write("/proc/self/gid_map", f"{USER_INSIDE} {group} 1")
    _wait_for_child_unless_child(pass_fds)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _make_root(binds, covers)
    _wait_for_child_unless_child(pass_fds)


def give_up_privileges(
    *, memory_bytes: int, cpu_seconds: int, file_bytes: int, user: int, is_root_outside: bool
) -> None:
    """An empty folder to work in, an unused user, no capability, limits, and the filter.

    Args:
        memory_bytes: of address space.
        cpu_seconds: after which a signal comes, that kills a second later at the latest.
        file_bytes: of one file, and of the folder.
        user: the number of a user that nobody is, to become where this process is root.
        is_root_outside: root started this, whatever a user namespace calls it.

    Raises:
        OSError: the kernel refuses a step.
    """
    options = f"size={file_bytes},nr_inodes={_MOST_FILES},mode=1777".encode()
    _call("mount", b"tmpfs", WORK_FOLDER.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(WORK_FOLDER)
    os.setsid()  # a signal to its own group would also reach those who wait for it
    for capability in range(64):  # first, since it takes a capability; most numbers do not exist
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    is_somebody_else = os.geteuid() == 0 and _become(user)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # A change of user clears this.
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    limit(memory_bytes=memory_bytes, cpu_seconds=cpu_seconds, file_bytes=file_bytes)
    # The limit on processes and threads counts all of a user, and does not bind root, not even in
    # a user namespace. Since Linux 5.14 each user namespace counts apart; before, a busy user's
    # other processes would use the limit up. Where it can't be had there are no threads at all.
    is_counted = is_somebody_else or (not is_root_outside and _kernel() >= (5, 14))
    if is_counted:
        resource.setrlimit(resource.RLIMIT_NPROC, (_MOST_PROCESSES, _MOST_PROCESSES))
    if seccomp.is_supported():
        seccomp.forbid_system_calls(_libc, threads=is_counted)
    elif not is_counted:
        raise OSError("neither a limit nor a filter can keep programs from starting processes")


def limit(*, memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    """The limits that need no isolation."""
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NOFILE, _MOST_OPEN_FILES, _MOST_OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        lower = [one if most == resource.RLIM_INFINITY else min(one, most) for one in (soft, hard)]
        resource.setrlimit(kind, (lower[0], lower[1]))


def _make_root(binds: list[tuple[str, str]], covers: list[str]) -> None:
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    # The new root is laid over /proc, since nothing that is bound comes from there.
    root = "/proc"
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=1m,mode=755")
    devices = [(one, one) for one in DEVICES]
    for source, target in (*binds, *devices):
        inside = root + target
        if os.path.isdir(source):
            os.makedirs(inside, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            _write(inside, "")
        _call("mount", source.encode(), inside.encode(), None, _MS_BIND | _MS_REC, None)
        is_device = (source, target) in devices
        _make_read_only(inside, _MS_NOSUID | (0 if is_device else _MS_NODEV), recursive=True)
    for folder in covers:
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
        _call("mount", b"tmpfs", (root + folder).encode(), b"tmpfs", flags, b"size=4k,mode=755")
    os.makedirs(root + WORK_FOLDER, exist_ok=True)
    _make_read_only(root, _MS_NOSUID | _MS_NODEV, recursive=False)
    os.chdir(root)
    # pivot_root(".", ".") lays the old root over the new one: pivot_root(2), NOTES.
    machine = os.uname().machine
    if machine not in _SYS_PIVOT_ROOT:
        raise OSError(f"the number of pivot_root on {machine} is not known here")
    _call("syscall", _SYS_PIVOT_ROOT[machine], b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _make_read_only(path: str, flags: int, *, recursive: bool) -> None:
    """mount_setattr(2), since Linux 5.12: unlike a remount it reaches the mounts below."""
    attributes = struct.pack("QQQQ", _MS_RDONLY | flags, 0, 0, 0)
    mode = _AT_RECURSIVE if recursive else 0
    _call(
        "syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), mode, attributes, len(attributes)
    )


def _wait_for_child_unless_child(pass_fds: tuple[int, ...]) -> None:
    child = os.fork()
    if child:
        _wait(child, pass_fds)


def _wait(child: int, pass_fds: tuple[int, ...]) -> NoReturn:
    """Wait, reap whoever else falls to this process, and end as the child does."""
    for fd in (0, 1, *pass_fds):
        os.close(fd)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _become(user: int) -> bool:
    """Whether this process is now `user`: a container may not have so large a number."""
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        return False
    return True


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(one for one in minor if one.isdigit()))


def _call(name: str, *arguments: int | bytes | None) -> None:
    """A function of the C library that gives 0 or sets errno."""
    # Without a prototype ctypes passes an int as 32 bits, which would cut a flag or a size.
    wide = [ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments]
    if getattr(_libc, name)(*wide):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments!r}: {os.strerror(number)}")


def report(error: OSError) -> NoReturn:
    """End the process; the reason goes to standard error, where nothing else has been written."""
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(1)

"""A filter of system calls: no new process, no socket, no door into the kernel that nobody needs.

It is a list of what is forbidden, so it is the second wall behind the namespaces, not the first.
Forbidding fork is what makes the limits of one process the limits of the whole program: memory and
CPU limits count per process, and the limit on the number of processes does not bind root. Two
architectures are known, of which only x86_64 has been tested; on others there is no filter
(`is_supported`).

The numbers are those of the kernel's tables (arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h). The program is classic BPF over `struct seccomp_data`
(linux/seccomp.h): the call's number is at byte 0, the architecture at 4, the arguments from 16.
"""

import ctypes
import errno
import os
import struct

# Name, number on x86_64, number on aarch64; "-" where an architecture lacks the call.
_FORBIDDEN = """
    fork 57 -               vfork 58 -                execve 59 221
    execveat 322 281        ptrace 101 117            process_vm_readv 310 270
    kcmp 312 272            process_vm_writev 311 271 pidfd_getfd 438 438
    socket 41 198           io_uring_setup 425 425    io_uring_enter 426 426
    bpf 321 280             io_uring_register 427 427 userfaultfd 323 282
    perf_event_open 298 241 memfd_create 319 279      memfd_secret 447 447
    shmget 29 194           semget 64 190             msgget 68 186
    mq_open 240 180         add_key 248 217           request_key 249 218
    keyctl 250 219          unshare 272 97            setns 308 268
    chroot 161 51           mount 165 40              umount2 166 39
    pivot_root 155 41       open_tree 428 428         move_mount 429 429
    fsopen 430 430          fsconfig 431 431          fsmount 432 432
    fspick 433 433          mount_setattr 442 442     name_to_handle_at 303 264
    quotactl 179 60         open_by_handle_at 304 265 quotactl_fd 443 443
    kexec_load 246 104      kexec_file_load 320 294   init_module 175 105
    finit_module 313 273    delete_module 176 106     reboot 169 142
    swapon 167 224          swapoff 168 225           acct 163 89
    syslog 103 116          settimeofday 164 170      clock_settime 227 112
    adjtimex 159 171        clock_adjtime 305 266     sethostname 170 161
    setdomainname 171 162   personality 135 92        modify_ldt 154 -
    iopl 172 -              ioperm 173 -              vhangup 153 58
"""
_CLONE = (56, 220)
_CLONE3 = (435, 435)  # its flags lie in memory, where a filter cannot look
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_ARCHITECTURES = ("x86_64", "aarch64")
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


def is_supported() -> bool:
    """Whether there is a filter for this architecture."""
    return os.uname().machine in _ARCHITECTURES


def forbid_system_calls(libc: ctypes.CDLL, *, threads: bool) -> None:
    """Put the filter on this process for ever; needs PR_SET_NO_NEW_PRIVS first.

    Args:
        libc: the C library.
        threads: whether new threads are allowed.

    Raises:
        OSError: the kernel refuses it.
    """
    program = _program(_ARCHITECTURES.index(os.uname().machine), threads=threads)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses a filter of system calls")


def _program(column: int, *, threads: bool) -> bytes:
    words = _FORBIDDEN.split()
    numbers = [int(one) for one in words[1 + column :: 3] if one != "-"]
    # A jump counts from the next instruction: (code, if true, if false, operand).
    refuse, no_such_call = _FAIL | errno.EPERM, _FAIL | errno.ENOSYS
    code = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[column]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, no_such_call),
    ]
    for number in numbers:
        code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    code += [
        # glibc takes ENOSYS for an old kernel and calls clone instead.
        (_JUMP_EQUAL, 0, 1, _CLONE3[column]),
        (_RETURN, 0, 0, no_such_call),
        (_JUMP_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, 16),
        (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD if threads else 0),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *one) for one in code)

"""Running generated code: kept apart from the machine, and judged so that it cannot lie.

Two processes judge a program, each in a sandbox of its own, new for every program. One holds the
program and answers calls to its functions. The other holds the tests, calls by message, compares
the answers, which are plain data, and gives the verdict. So nothing that a program does to its own
process can make it pass: not exiting early with status 0, not printing, not replacing builtins,
`assert` helpers or `__eq__`, not searching frames or the garbage collector (neither tests nor
expected values nor the verdict's file are in that process), not writing to descriptors that it has
(they carry answers to calls, which are judged), not killing (it sees no other process). All that
a program decides is what its functions return, raise, and do to their arguments. What does pass:
a program that knows the right answers by heart, or takes a test's arguments for a hint.

The walls, by namespaces, either made by bubblewrap or here (`choose_isolation` tries and takes the
first that works): no network; no file but the interpreter with the `lib` folder it is installed in,
the system's library folders and numpy, all read-only, and empty folders in the place of all other
installed packages, so nothing of /etc or /proc, and of the home folder nothing but an interpreter
that is installed there; an empty folder in memory, limited in size and number of files; no process
to see but its own; an environment of six fixed variables; no capability, no way to new privileges,
and, where root starts it, an unused user. Limits: CPU time, wall time, address space, file size,
open files, threads. A filter of system calls forbids new processes, new programs, sockets, ptrace,
mounts and what else no solution needs (x86_64 and aarch64); where there is no filter, the number of
processes is limited instead. What a program prints goes nowhere.

What it does not protect against: bugs in the kernel, which programs can reach with most system
calls, or in the processor; side channels, such as the time others' work takes, and what the
interpreter tells of the machine (its version, where it and this package are installed); load,
since a program may take a core, `memory_bytes` and `file_bytes` up to its time limit, and as much
again for its tests; the kernel's own memory, which is limited only by the numbers of threads, files
and pipes. It isolates
from the tests' authors no less: tests run behind the same walls, but theirs is the verdict. It is
no place for programs that somebody writes to break out of it on purpose; use a virtual machine.

Differences from tests in the program's own process: arguments and results are copied (identity is
lost; changes to lists, dicts and sets are carried back), a subclass of a builtin type arrives as
that type, an object of any other class equals nothing and is as true as it was there, tests do not
see what the program prints, and tests that hand over a function or object are an `error`.
"""

from loratune.evaluation.sandbox.choosing import available_isolations, choose_isolation
from loratune.evaluation.sandbox.isolation import Isolation, Limits
from loratune.evaluation.sandbox.judging import Check, Judgement, judge_program, judge_programs

__all__ = [
    "Check",
    "Isolation",
    "Judgement",
    "Limits",
    "available_isolations",
    "choose_isolation",
    "judge_program",
    "judge_programs",
]

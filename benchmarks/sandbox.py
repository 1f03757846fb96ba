"""What the sandbox costs: seconds per program beside the bare program's, and programs a minute.

    python benchmarks/sandbox.py --programs 1000

The programs are like HumanEval's solutions: a function of a few lines that imports typing, seven
tests. Bare is one process of the interpreter that runs program and tests together, as a checker
without walls would. Measured one program at a time (the overhead), and with a worker a core.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from loratune.evaluation.sandbox import (
    Check,
    Isolation,
    available_isolations,
    judge_program,
    judge_programs,
)

PROGRAM = """
from typing import List

def close_elements(numbers: List[float], threshold: float) -> bool:
    for index, one in enumerate(numbers):
        for other in numbers[index + 1 :]:
            if abs(one - other) < threshold:
                return True
    return False
"""
TESTS = "\n".join(
    f"assert close_elements([1.0, 2.0, 3.9, 4.0, {n}.5], 0.3) == True" for n in range(7)
)
CHECK = Check(PROGRAM, TESTS, ("close_elements",))


def run_bare(_=None) -> None:
    source = f"{PROGRAM}\n{TESTS}\n"
    subprocess.run([sys._base_executable, "-I", "-S", "-c", source], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=200)
    num_programs = parser.parse_args().programs
    workers = len(os.sched_getaffinity(0))
    run_bare()

    def seconds_each(run) -> float:
        begin = perf_counter()
        run()
        return (perf_counter() - begin) / num_programs

    def bare_in_parallel() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run_bare, range(num_programs)))

    def one_by_one(isolation) -> None:
        for _ in range(num_programs):
            assert judge_program(CHECK, isolation=isolation).verdict == "correct"

    def in_parallel(isolation) -> None:
        judgements = judge_programs([CHECK] * num_programs, isolation=isolation)
        assert all(one.verdict == "correct" for one in judgements)

    bare = seconds_each(lambda: [run_bare() for _ in range(num_programs)])
    bare_parallel = seconds_each(bare_in_parallel)
    for isolation in (*available_isolations(), Isolation("none")):
        single = seconds_each(lambda: one_by_one(isolation))  # noqa: B023  # called at once
        parallel = seconds_each(lambda: in_parallel(isolation))  # noqa: B023
        result = {
            "isolation": isolation.kind,
            "user_namespace": isolation.with_user,
            "programs": num_programs,
            "workers": workers,
            "bare_seconds": round(bare, 4),
            "seconds": round(single, 4),
            "overhead_seconds": round(single - bare, 4),
            "bare_seconds_parallel": round(bare_parallel, 4),
            "seconds_parallel": round(parallel, 4),
            "overhead_seconds_parallel": round(parallel - bare_parallel, 4),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

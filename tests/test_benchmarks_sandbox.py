"""The benchmarks of the sandbox: that they run and tell the truth, not what they measure."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.evaluation.sandbox import Isolation, available_isolations

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_sandbox_benchmark_measures_every_isolation_of_this_machine():
    command = [sys.executable, str(BENCHMARKS / "sandbox.py"), "--programs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [Isolation(row["isolation"], row["user_namespace"]) for row in rows]
    assert kinds == [*available_isolations(), Isolation("none")]
    for row in rows:
        assert row["bare_seconds"] > 0
        assert row["seconds"] > 0


@pytest.mark.parametrize(("solution", "code"), [("    return a + b", 0), ("    return a", 1)])
def test_a_reference_solution_that_fails_its_tests_is_named(
    solution: str, code: int, tmp_path: Path
):
    if not available_isolations():
        pytest.skip("no isolation works here")
    row = {
        "task_id": "Ours/7",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "canonical_solution": solution,
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3",
    }
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    command = [sys.executable, str(BENCHMARKS / "code_references.py"), "--humaneval", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("Ours/7: wrong: AssertionError" in done.stdout) == bool(code)

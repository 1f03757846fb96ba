"""The benchmarks on a CPU at a tiny shape: that they run and count right, not what they measure."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loratune.data.order import row_order
from loratune.engine.base import Event, Failed, Progress
from loratune.planning.cost import flops_per_token
from loratune.planning.targets import matched_linears

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of the benchmarks folder, which is no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def throughput(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), "--device", "cpu"]
    command += ["--shapes", "tiny", "--seconds", "0.02", "--compile-backend", "eager", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_case_of_a_tiny_shape_is_measured_and_written(tmp_path: Path):
    path = tmp_path / "results.json"
    table = throughput(
        "--batch-sizes", "2", "--only", "matmul,peft,compiled,packed,dora", "--json", str(path)
    )
    results = json.loads(path.read_text())["results"]
    assert [one["error"] for one in results] == [None] * len(results)
    what = [one["case"]["what"] for one in results]
    assert sorted(set(what)) == sorted(
        ["matmul", "copy", "peft", "compiled-bfloat16", "compiled-float32", "packed"]
    )
    for one in results[2:]:
        assert one["rows_per_second"] > 0
        # Rows of 16 tokens, all of one length.
        assert one["tokens_per_second"] == pytest.approx(16 * one["rows_per_second"])
    assert len(table.splitlines()) == 2 + len(results)


def test_resume_measures_only_what_is_missing(tmp_path: Path):
    path = tmp_path / "results.json"
    throughput("--only", "matmul", "--json", str(path))
    before = json.loads(path.read_text())["results"]
    throughput("--only", "matmul", "--batch-sizes", "2", "--json", str(path), "--resume")
    assert json.loads(path.read_text())["results"] == before


def test_a_turn_of_the_pack_counts_the_rows_of_all_its_trials(benchmark_module: Any):
    many, rows = benchmark_module("many_adapters"), benchmark_module("random_rows")
    shape = benchmark_module("model_shapes").SHAPES["tiny"]
    data = rows.gsm8k_like_rows(shape, num_rows=50)
    trials = [rows.long_trial(data, slot=slot, batch_size=2, rank=4) for slot in range(3)]

    def events() -> Iterator[Event]:
        for update in range(100):
            for trial in trials:
                yield Progress(trial.trial_id, update, 2, 1.0)

    advance = many.advance_by_events(events(), data, trials)
    assert advance()[0] == 2  # the first event is the first trial's
    turns = [advance() for _ in range(75)]
    assert {num_rows for num_rows, _ in turns} == {6}
    # 3 trials x 75 turns x 2 rows: each of 50 rows is seen 9 times (3 epochs of each trial).
    first, last = (
        int(data.train.lengths[row_order(trials[0].seed, num_rows=50, start=start, count=2)].sum())
        for start in (0, 150)
    )
    assert sum(tokens for _, tokens in turns) == 9 * data.facts.num_tokens - first + last


def test_a_failed_trial_ends_a_measurement_with_its_error(benchmark_module: Any):
    many, rows = benchmark_module("many_adapters"), benchmark_module("random_rows")
    data = rows.equal_rows(benchmark_module("model_shapes").SHAPES["tiny"], num_rows=4)
    trials = [rows.long_trial(data, slot=0, batch_size=1, rank=4)]
    failed = Failed(trials[0].trial_id, ValueError("refused"))
    with pytest.raises(ValueError, match="refused"):
        many.advance_by_events(iter([failed]), data, trials)()


@pytest.mark.parametrize("name", ["135m", "0.6b", "1b", "7b"])
def test_the_roofline_counts_the_flops_of_the_cost_formula(benchmark_module: Any, name: str):
    shape = benchmark_module("model_shapes").SHAPES[name]
    by_hand = benchmark_module("roofline").bound(shape, rank=16, batch_size=1).flops
    targets = matched_linears(shape.facts, benchmark_module("model_shapes").TARGETS)
    assert by_hand == pytest.approx(
        flops_per_token(
            shape.facts, rank=16, targets=targets, mean_attended_tokens=256, target_share=1.0
        )
    )


def test_the_documented_roofline_is_the_one_that_is_computed(benchmark_module: Any):
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert benchmark_module("roofline").table(rank=16) in page

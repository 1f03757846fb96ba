"""The benchmarks on a CPU at a tiny shape: that they run and count right, not what they measure."""

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from scipy import stats

from loratune.data.order import row_order
from loratune.engine.base import Event, Failed, Progress
from loratune.planning.cost import flops_per_token
from loratune.planning.pack_shape import SHARE_OF_MEMORY
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


# ---------------------------------------------------------------------------- what is kept


def test_results_are_gone_on_with_and_those_of_other_settings_refused(
    benchmark_module: Any, tmp_path: Path
):
    kept_results = benchmark_module("kept_results")
    path = tmp_path / "kept.json"
    kept = kept_results.KeptResults(path, settings={"sizes": (1, 2)}, about={"python": "3"})
    kept.add("first", {"loss": 1.5})
    again = kept_results.KeptResults(path, settings={"sizes": (1, 2)}, about={})
    assert "first" in again
    assert again.results == {"first": {"loss": 1.5}}
    with pytest.raises(SystemExit, match="other settings"):
        kept_results.KeptResults(path, settings={"sizes": (1, 3)}, about={})


def test_nothing_is_begun_that_may_end_after_the_limit(benchmark_module: Any):
    now = [100.0]
    minutes = benchmark_module("kept_results").Minutes(1, clock=lambda: now[0])
    assert minutes.allow("trial")
    now[0] += 25
    minutes.took("trial", 25)
    assert minutes.allow("trial")  # 50 of 60 seconds when it ends
    now[0] += 20
    minutes.took("trial", 20)
    assert not minutes.allow("trial")  # 45 + 25, the longest
    assert minutes.allow("another kind")
    assert benchmark_module("kept_results").Minutes(None, clock=lambda: now[0]).allow("trial")


# ---------------------------------------------------------------------------- agreement


def agree(module: Any, *arguments: str) -> int:
    small = ["--device", "cpu", "--model", "demo:1m", "--rows", "16", "--validation-rows", "8"]
    small += ["--configurations", "lora:4:1e-2,milora:8:1e-2", "--seeds", "3"]
    return module.main([*small, *arguments])


def test_both_engines_agree_in_float32_and_what_was_trained_is_not_trained_again(
    benchmark_module: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    module, path = benchmark_module("agreement"), tmp_path / "agreement.json"
    arguments = ("--precision", "float32", "--json", str(path))
    # No time at all: the pack, which nothing is known of yet, is not begun either.
    assert agree(module, *arguments, "--minutes", "0") == 3
    assert agree(module, *arguments) == 0
    written = json.loads(path.read_text())
    assert len(written["results"]) == 3 * 2 * 3
    summary = written["summary"]
    assert summary["verdict"] == "holds"
    # In float32 the runs differ by rounding alone.
    assert 0 < summary["packed_minus_reference"]["rms"] < 1e-4
    assert 0 < summary["other_cuts_minus_reference"]["rms"] < 1e-4
    by_run = {key: one.get("microbatches_per_update") for key, one in written["results"].items()}
    assert by_run["reference/lora:4:0.01/seed 0"] == 1
    assert by_run["reference, other cuts/lora:4:0.01/seed 0"] > 1.5

    capsys.readouterr()
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("nothing is left to train"))
    assert agree(module, *arguments) == 0
    assert "holds: the interval lies within" in capsys.readouterr().out
    assert json.loads(path.read_text()) == written


def test_the_interval_is_students_and_the_sd_between_seeds_is_pooled(benchmark_module: Any):
    module = benchmark_module("agreement")
    generator = np.random.default_rng(3)
    differences = generator.normal(0.2, 1.0, size=30)
    found = module.Difference.of(differences.tolist())
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.rms == pytest.approx(np.sqrt(np.mean(differences**2)))
    # Two configurations around other means: only the spread within each counts.
    groups = [generator.normal(mean, 2.0, size=10) for mean in (0.0, 100.0)]
    pooled = np.sqrt((np.var(groups[0], ddof=1) + np.var(groups[1], ddof=1)) / 2)
    assert module.seed_sd([group.tolist() for group in groups]) == pytest.approx(pooled)


def groups_with(module: Any, *, offset: float, noise: float) -> list[Any]:
    """Three configurations of ten seeds, SD 0.1 between seeds."""
    generator = np.random.default_rng(0)
    groups = list[Any]()
    for name in "abc":
        reference = generator.normal(2.0, 0.1, size=10)
        packed = reference + offset + generator.normal(0.0, noise, size=10)
        other = reference + generator.normal(0.0, noise, size=10)
        seconds = dict.fromkeys((module.REFERENCE, module.PACKED, module.OTHER_CUTS), 1.0)
        losses = (tuple(one.tolist()) for one in (reference, packed, other))
        groups.append(module.Group(name, *losses, seconds))
    return groups


@pytest.mark.parametrize(
    ("offset", "noise", "verdict"),
    [
        (0.0, 0.01, "holds"),
        (0.02, 0.01, "fails"),  # a fifth of the SD between seeds, and no doubt about it
        (-0.02, 0.01, "fails"),
        (0.0, 0.1, "undecided"),  # the interval is as wide as 0.04
        (0.01, 0.03, "undecided"),  # on the edge
    ],
)
def test_a_verdict_is_given_only_where_the_interval_lies_on_one_side_of_the_margin(
    benchmark_module: Any, offset: float, noise: float, verdict: str
):
    module = benchmark_module("agreement")
    groups = groups_with(module, offset=offset, noise=noise)
    summary = module.summary_of(groups, num_planned=30, packing_decided=False)
    assert summary["verdict"] == verdict
    assert len(module.table(groups).splitlines()) == 5
    short = module.summary_of(groups, num_planned=31, packing_decided=False)
    assert short["verdict"] == ("undecided" if verdict == "holds" else verdict)
    refuted = module.summary_of(groups, num_planned=30, packing_decided=True)
    assert refuted["verdict"] == "fails"


def test_the_pairs_that_an_undecided_proof_needs_would_decide_it(benchmark_module: Any):
    module = benchmark_module("agreement")
    (seen,) = [module.Difference(30, 0.002, -0.03, 0.034, 0.08, 0.08, 0.2)]
    needed = module.pairs_needed(seen, room=0.008)

    def half_width(n: int) -> float:
        return stats.t.ppf(0.975, n - 1) * 0.08 / np.sqrt(n)

    assert half_width(needed) < 0.008 < half_width(int(0.95 * needed))
    assert f"{needed} trials would decide it" in module.judge(seen, margin=0.01)[1]


def test_a_trial_that_ends_otherwise_in_the_pack_alone_refutes_it(benchmark_module: Any):
    module = benchmark_module("agreement")
    configuration = module.Configuration("lora", 4, 1e-2)
    trials = [SimpleNamespace(seed=seed) for seed in range(2)]
    bench = SimpleNamespace(trials={configuration: trials})

    def results(**of_second: str) -> dict[str, Any]:
        return {
            module.key_of(run, configuration, trial): {
                "status": of_second.get(name, "done") if trial.seed else "done",
                "validation_loss": 1.0,
                "seconds": 1.0,
            }
            for name, run in (
                ("reference", module.REFERENCE),
                ("packed", module.PACKED),
                ("other", module.OTHER_CUTS),
            )
            for trial in trials
        }

    (group,), remarks, refuted = module.groups_of(bench, results(packed="diverged"))
    assert (len(group.packed), len(remarks), refuted) == (1, 1, True)
    both = results(reference="diverged", packed="diverged")
    (group,), remarks, refuted = module.groups_of(bench, both)
    assert (len(group.packed), len(remarks), refuted) == (1, 1, False)


def test_the_first_step_is_timed_from_the_start_of_the_process(benchmark_module: Any):
    module = benchmark_module("first_step")
    one = module.first_step("tiny", batch_size=2, device=torch.device("cpu"))
    running = time.time() - psutil.Process().create_time()
    assert 0 < one.imports < one.engine < one.first_update <= running


# ---------------------------------------------------------------------------- attention launches


def launches_in(table: str) -> dict[int, tuple[int, ...]]:
    """A table of engine/attention_kernels.py, which only imports where Triton is."""
    source = (
        BENCHMARKS.parent / "src" / "loratune" / "engine" / "attention_kernels.py"
    ).read_text()
    (value,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table
    )
    return eval(ast.unparse(value), {"Launch": lambda *sizes: sizes})


def test_the_launches_in_use_are_the_fastest_that_were_recorded(benchmark_module: Any):
    module = benchmark_module("attention_launches")
    shapes = benchmark_module("model_shapes").SHAPES
    recorded = json.loads(
        (BENCHMARKS.parent / "docs" / "log" / "attention-launches-h200.json").read_text()
    )
    for width in (64, 128):
        for what, table in module.TABLES.items():
            times = {
                (name, rows, tuple(sizes)): time
                for name, rows, which, sizes, time in recorded
                if which == what and shapes[name].head_dim == width
            }
            assert {(name, rows) for name, rows, _ in times} == {
                (name, rows)
                for name in (("135m", "1b") if width == 64 else ("0.6b", "7b"))
                for rows in ("equal", "gsm8k")
            }
            assert module.chosen(times) == launches_in(table)[width], (width, what)


def test_a_launch_that_was_not_timed_everywhere_is_not_chosen(benchmark_module: Any):
    chosen = benchmark_module("attention_launches").chosen
    slow, quick, sound = (1, 1, 4, 1), (2, 2, 4, 1), (3, 3, 4, 1)
    times = {("a", "equal", slow): 9.0, ("b", "equal", slow): 9.0, ("a", "equal", quick): 1.0}
    assert chosen(times) == slow
    assert chosen(times | {("a", "equal", sound): 2.0, ("b", "equal", sound): 2.0}) == sound
    with pytest.raises(ValueError, match="no launch was timed everywhere"):
        chosen({("a", "equal", slow): 1.0, ("b", "equal", quick): 1.0})


# ---------------------------------------------------------------------------- random packs


def test_random_packs_are_trained_once_each_and_stay_the_same(
    benchmark_module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    module, path = benchmark_module("random_packs"), tmp_path / "packs.json"
    arguments = ["--device", "cpu", "--most-trials", "4", "--steps", "2", "--json", str(path)]
    assert module.main([*arguments, "--packs", "6", "--minutes", "0"]) == 3
    assert "0 of 6 packs" in capsys.readouterr().out
    assert module.main([*arguments, "--packs", "2"]) == 0
    first = json.loads(path.read_text())["results"]
    assert module.main([*arguments, "--packs", "6"]) == 0
    results = json.loads(path.read_text())["results"]
    assert len(results) == 6
    assert {number: results[number] for number in first} == first
    for one in results.values():
        assert one["statuses"] == {"done": one["num_trials"]}
        assert one["num_updates"] == 2 * one["num_trials"]
        assert not module.is_bad(one)
    assert "6 of 6 packs" in capsys.readouterr().out
    paths = [tmp_path / "odd.json", tmp_path / "even.json"]
    for part, of_part in zip(("1/2", "2/2"), paths, strict=True):
        more = ["--packs", "4", "--json", str(of_part), "--part", part]
        assert module.main([*arguments, *more]) == 3
    odd, even = (json.loads(one.read_text())["results"] for one in paths)
    assert (list(odd), list(even)) == (["0", "2"], ["1", "3"])
    more = ["--packs", "4", "--json", str(paths[0]), "--join", str(paths[1])]
    assert module.main([*arguments, *more]) == 0
    joined = json.loads(paths[0].read_text())["results"]
    assert joined == odd | even


def test_random_packs_reach_the_memory_they_are_planned_for_and_every_kind_of_pack(
    benchmark_module: Any,
):
    module = benchmark_module("random_packs")
    shape = benchmark_module("model_shapes").SHAPES["135m"]
    few_rows = {
        name: benchmark_module("random_rows").equal_rows(
            replace(shape, row_tokens=tokens), num_rows=32
        )
        for name, tokens in (("short", 64), ("long", 512))
    }
    base = SimpleNamespace(model=SimpleNamespace(dtype=torch.bfloat16), device="cpu")
    bench = module.Bench(shape, base, few_rows, 80 * 2**30, steps=2, most_trials=32, seed=0)
    draws = [bench.draw(number) for number in range(60)]
    assert draws[7] == bench.draw(7)
    shapes = [one.shape for one in draws]
    for name in ("corrected", "magnitudes", "dropout", "gradient_checkpointing"):
        assert {getattr(one, name) for one in shapes} == {True, False}
    filled = [one.planned_bytes / one.memory_bytes for one in draws]
    assert max(filled) <= SHARE_OF_MEMORY
    assert sum(share > 0.7 for share in filled) >= 10


def test_a_pack_that_ran_out_of_memory_or_was_made_smaller_is_counted(benchmark_module: Any):
    module = benchmark_module("random_packs")
    kinds = ("corrected", "magnitudes", "dropout", "gradient_checkpointing")
    good = {
        "shape": dict.fromkeys(kinds, False),
        "planned_bytes": 97,
        "memory_bytes": 200,
        "reserved_bytes": 100,
        "allocated_bytes": 80,
        "num_out_of_memory": 0,
        "num_retries": 0,
        "was_shrunk": False,
        "statuses": {"done": 3},
        "error": None,
    }
    far = {**good, "reserved_bytes": 110}
    shrunk = {**good, "num_out_of_memory": 1, "was_shrunk": True}
    assert [module.is_bad(one) for one in (good, far, shrunk)] == [False, False, True]
    assert module.is_bad({**good, "statuses": {"out_of_memory": 1}})
    everything = module.table([good, far, shrunk]).splitlines()[2]
    # Number, out of memory, shrunk, broken, retries; then those within 5% of those that trained.
    assert everything.startswith("| all | 3 | 1 | 1 | 0 | 0 | 0.882")
    assert "| 1 of 2 |" in everything


# ---------------------------------------------------------------------------- several devices


def test_a_run_counts_rows_from_the_moment_at_which_every_process_trains(benchmark_module: Any):
    module = benchmark_module("devices")
    updates = [(10.0, "a", 4), (11.0, "a", 4), (12.0, "b", 4), (13.0, "a", 4), (16.0, "b", 4)]
    measured = module.reckon(
        updates, {"a": 1, "b": 2}, devices="x,y", begun=5.0, seconds=20.0, statuses={"done": 2}
    )
    assert (measured.num_rows, measured.training_rows) == (20, 8)
    assert (measured.start_up_seconds, measured.training_seconds) == (7.0, 4.0)
    assert measured.trials_by_process == (1, 1)
    assert measured.training_rows_per_second == 2.0
    assert measured.rows_per_second == 1.0


def test_a_study_on_one_device_is_run_and_its_rows_counted(benchmark_module: Any, tmp_path: Path):
    module = benchmark_module("devices")
    options = module.parse(
        ["--model", "tiny", "--trials", "4", "--rows", "8", "--row-tokens", "16"]
    )
    study = module.write_study(options, tmp_path)
    measured = module.measure(study, "cpu", out=tmp_path / "out")
    assert measured.num_rows == 4 * 8
    # The first update is start-up.
    assert measured.training_rows == 4 * 8 - 4
    assert measured.statuses == {"done": 4}
    assert measured.trials_by_process == (4,)
    assert 0 < measured.start_up_seconds + measured.training_seconds < measured.seconds


@pytest.mark.slow
def test_two_processes_share_a_study_and_are_compared_with_one(tmp_path: Path):
    path = tmp_path / "devices.json"
    command = [sys.executable, str(BENCHMARKS / "devices.py"), "--devices", "cpu,cpu"]
    command += ["--model", "tiny", "--trials", "12", "--rows", "128", "--row-tokens", "128"]
    command += ["--batch-size", "32", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    shares = written["results"]["cpu,cpu"]["trials_by_process"]
    assert len(shares) == 2
    assert sum(shares) == 12
    assert f"{written['ratio_while_training']:.2f} times the rows/s while training" in done.stdout

"""The command line from outside: answers, formats, exit codes, and what bad input gets."""

import csv
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from loratune import cli
from loratune.analyse.lemma import DEFAULT_REPLICATES
from loratune.store.database import open_store
from loratune.study.presets import preset_names, preset_scales
from tiny_models import save_tiny

STUDY = """\
study: tiny
model: model
precision: float32
data:
  train: rows.jsonl
  prompt: question
  response: answer
  template: "{prompt}"
  max_tokens: 64
  validation: {rows: 8}
protocol: {kind: fixed_samples, epochs: 1}
methods: [lora, pissa]
rank: 2
alpha: rank
targets: all-linear
batch_size: [8, 16]
learning_rate: [1e-3, 1e-2]
seeds: 2
schedule: {kind: cosine}
"""
NUM_TRIALS = 16
# The last section of the design, word by word, and what came after it.
RESULT_COLUMNS = [
    "trial_id", "study", "status", "method", "model", "rank", "alpha", "targets", "batch_size",
    "learning_rate", "seed", "protocol", "epochs", "num_train_rows", "schedule", "warmup_steps",
    "beta2", "precision", "data_fingerprint", "select_on", "num_updates", "train_loss",
    "validation_loss", "seconds", "tokens", "peak_memory_bytes", "engine", "error",
    "purpose",
]  # fmt: skip
CELL_COLUMNS = [
    "best_learning_rate", "lr_at_edge", "score", "score_metric", "higher_is_better",
    "score_low", "score_high", "num_seeds",
]  # fmt: skip
RECOMMENDATION_KEYS = [
    "batch_size", "batch_size_low", "batch_size_high", "learning_rate",
    "acceptable_batch_sizes", "fastest_acceptable_batch_size", "rows_per_microbatch",
    "gradient_accumulation_steps", "evidence", "extrapolated_over", "cost_fraction",
    "undecided",
]  # fmt: skip


class Answer:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def loratune(monkeypatch, capsysbinary):
    """`loratune ARGS` in this process: its exit code, stdout and stderr."""

    def call(*arguments: str, stdin: str = "") -> Answer:
        monkeypatch.setattr(sys, "argv", ["loratune", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsysbinary.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        read = capsysbinary.readouterr()
        return Answer(code, read.out.decode(), read.err.decode())

    return call


def rows(count: int = 48) -> str:
    lines = [
        {"question": f"what is {n} plus {n + 1}? ", "answer": f"it is {2 * n + 1}"}
        for n in range(count)
    ]
    return "\n".join(json.dumps(line) for line in lines) + "\n"


def furnish(folder: Path) -> Path:
    """A tiny model, its rows and its study."""
    save_tiny(folder / "model", "llama")
    (folder / "rows.jsonl").write_text(rows())
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("furnished"))


@pytest.fixture(scope="module")
def finished(furnished):
    """The study's results, trained once for all tests that only read them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "loratune.cli", "run", "study.yaml", "--out", "results"]
    done = subprocess.run(
        command, cwd=furnished, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "report: results/report.html" in done.stdout
    assert f"[{NUM_TRIALS}/{NUM_TRIALS}]" in done.stderr
    return furnished / "results"


# What an answer looks like ------------------------------------------------------------------------


def test_results_have_the_columns_that_others_rely_on(loratune, finished):
    answer = loratune("results", finished)
    table = list(csv.DictReader(io.StringIO(answer.out)))
    assert list(table[0]) == RESULT_COLUMNS
    assert len(table) == NUM_TRIALS
    assert {row["status"] for row in table} == {"done"}
    assert {row["engine"] for row in table} == {"packed"}
    assert json.loads(loratune("results", finished, "--format", "json").out)[0].keys() == set(
        RESULT_COLUMNS
    )
    assert loratune("results", finished, "--json").out.startswith("[")


def test_parquet_holds_the_same_table(loratune, finished, tmp_path):
    import pandas as pd

    answer = loratune(
        "results", finished, "--format", "parquet", "--output", tmp_path / "r.parquet"
    )
    assert (answer.code, answer.out) == (0, "")
    frame = pd.read_parquet(tmp_path / "r.parquet")
    assert list(frame.columns) == RESULT_COLUMNS
    table = list(csv.DictReader(io.StringIO(loratune("results", finished).out)))
    assert [float(row["validation_loss"]) for row in table] == frame["validation_loss"].tolist()


def test_cells_have_their_columns(loratune, finished):
    table = list(csv.DictReader(io.StringIO(loratune("cells", finished).out)))
    assert len(table) == 4
    assert [name for name in CELL_COLUMNS if name not in table[0]] == []
    assert not {"learning_rate", "seed"} & set(table[0])


def test_a_recommendation_has_the_keys_that_others_rely_on(loratune, finished):
    answer = json.loads(loratune("recommend", finished, "--json").out)
    assert [key for key in RECOMMENDATION_KEYS if key not in answer] == []
    assert answer["method"] == "lora"
    assert json.loads(loratune("recommend", finished, "--json", "--method", "pissa").out)["method"]


def test_compare_report_and_plain_text_answer_too(loratune, finished):
    (one,) = json.loads(loratune("compare", finished, "--json").out)["comparisons"]
    assert (one["method"], one["baseline"], one["num_seeds"]) == ("pissa", "lora", 2)
    assert "pissa against lora" in loratune("compare", finished).out
    assert "lora" in loratune("recommend", finished).out
    before = (finished / "report.html").read_bytes()
    assert loratune("report", finished).out == f"{finished / 'report.html'}\n"
    assert (finished / "report.html").read_bytes() == before
    assert json.loads(loratune("report", finished, "--json").out)["figures"]


def test_a_second_run_trains_nothing_and_gives_the_same_answer(loratune, finished, furnished):
    before = loratune("results", finished).out
    answer = loratune("run", furnished / "study.yaml", "--out", finished, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["statuses"] == {"done": NUM_TRIALS}
    assert loratune("results", finished).out == before


# transformers' own deprecation, met inside PEFT's loading.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_adapters_that_are_kept_load_in_plain_peft(finished, furnished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kept = sorted((finished / "adapters").iterdir())
    assert len(kept) == 4
    base = AutoModelForCausalLM.from_pretrained(furnished / "model")
    for folder in kept:
        PeftModel.from_pretrained(base, folder).unload()


def test_plan_reads_the_model_and_the_rows_and_writes_nothing(loratune, furnished):
    before = {path: path.stat().st_mtime_ns for path in furnished.rglob("*")}
    answer = json.loads(loratune("plan", furnished / "study.yaml", "--json", "--trials").out)
    assert answer["num_trials"] == len(answer["trials"]) == NUM_TRIALS
    assert answer["provisional"] is False
    assert answer["trials"][0]["num_updates"] == 5
    assert [one["kind"] for one in answer["alternatives"]] == ["adaptive", "proxy"]
    assert {path: path.stat().st_mtime_ns for path in furnished.rglob("*")} == before


def test_plan_takes_a_rate_measured_in_a_results_folder(loratune, furnished, finished):
    answer = json.loads(
        loratune("plan", furnished / "study.yaml", "--json", "--like", finished).out
    )
    assert "measured on 16 trials" in answer["device"]
    total = sum(
        float(row["seconds"])
        for row in csv.DictReader(io.StringIO(loratune("results", finished).out))
    )
    assert answer["hours"] * 3600 == pytest.approx(total, rel=1.0)


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in preset_names() for scale in preset_scales(name)]
)
def test_every_preset_can_be_printed_and_planned(loratune, name, scale):
    text = loratune("init", name, "--scale", scale).out
    answer = loratune("plan", "-", "--json", stdin=text)
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["provisional"] is True


def test_tune_writes_a_study_prints_it_runs_it_and_answers(loratune, furnished, monkeypatch):
    monkeypatch.chdir(furnished)
    monkeypatch.setattr("loratune.new_study.GRID_LEARNING_RATES", "[1e-3]")
    answer = loratune(
        "tune", "--model", "model", "--data", "rows.jsonl", "--out", "tuned", "--rank", "2"
    )
    assert answer.code == 0, answer.err
    assert 'prompt: "question"' in answer.err
    assert "batch size" in answer.out
    again = loratune("run", "tuned/study.yaml", "--out", "tuned", "--quiet")
    assert again.code == 0, again.err


def test_an_interrupted_run_exits_130_and_goes_on_to_the_same_table(furnished, finished, loratune):
    (furnished / "slow.yaml").write_text(STUDY.replace("epochs: 1", "epochs: 30"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Packed, a trial has other neighbours afterwards, and its numbers differ by rounding.
    base = [
        sys.executable,
        "-m",
        "loratune.cli",
        "run",
        "slow.yaml",
        "--engine",
        "reference",
        "--out",
    ]
    with subprocess.Popen(
        [*base, "stopped"], cwd=furnished, env=environment, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("[2/"):
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "goes on" in rest
    assert "Traceback" not in rest
    for folder in ("stopped", "whole"):
        done = subprocess.run(
            [*base, folder, "--quiet"], cwd=furnished, env=environment, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    tables = []
    for folder in ("stopped", "whole"):
        table = list(csv.DictReader(io.StringIO(loratune("results", furnished / folder).out)))
        tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in table])
    assert tables[0] == tables[1]


def test_the_engine_is_chosen_and_what_it_cannot_train_is_refused(loratune, furnished, tmp_path):
    study = str(furnished / "study.yaml")
    (furnished / "adalora.yaml").write_text(STUDY.replace("[lora, pissa]", "[lora, adalora]"))
    refused = loratune(
        "run", furnished / "adalora.yaml", "--out", tmp_path / "packed", "--engine", "packed"
    )
    assert refused.code == 2
    assert "the packed engine can't train" in refused.err
    assert not (tmp_path / "packed").exists()
    chosen = loratune("run", study, "--out", tmp_path / "out", "--engine", "reference", "--quiet")
    assert chosen.code == 0, chosen.err
    table = list(csv.DictReader(io.StringIO(loratune("results", tmp_path / "out").out)))
    assert {row["engine"] for row in table} == {"reference"}


def test_two_processes_stopped_from_the_terminal_go_on_to_the_table_of_one(
    furnished, finished, loratune
):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "loratune.cli", "run", "study.yaml", "--out", "shared",
        "--devices", "cpu,cpu",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=furnished, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("[2/"):
                break
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches every process of the terminal.
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "goes on" in rest
    assert "Traceback" not in rest
    done = subprocess.run(
        command, cwd=furnished, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # One line a trial and no other process's: the parent alone speaks.
    assert all(line[0] in "[0123456789d" for line in done.stderr.splitlines()), done.stderr
    of_one, of_two = (
        list(csv.DictReader(io.StringIO(loratune("results", folder).out)))
        for folder in (finished, furnished / "shared")
    )
    learned = ("train_loss", "validation_loss")
    for one, two in zip(of_one, of_two, strict=True):
        same = one.keys() - {"seconds", *learned}
        assert {name: one[name] for name in same} == {name: two[name] for name in same}
        for name in learned:  # Other neighbours in the pack: rounding.
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4)


def test_devices_that_are_not_there_or_are_given_twice_are_refused(loratune, furnished, tmp_path):
    study = str(furnished / "study.yaml")
    for given in (["cuda:99,cpu"], [""], ["cpu", "--device", "cpu"]):
        refused = loratune("run", study, "--out", tmp_path / "out", "--devices", *given)
        assert refused.code == 2, refused.err
        assert not (tmp_path / "out").exists()


def test_a_failed_trial_is_exit_code_1_and_its_reason_is_in_the_table(
    loratune, furnished, tmp_path
):
    # AdaLoRA needs updates to prune in: one is too few, and only the method knows.
    text = STUDY.replace("[lora, pissa]", "[adalora]").replace("[8, 16]", "[40]")
    text = text.replace("model: model", f"model: {furnished / 'model'}")
    (tmp_path / "study.yaml").write_text(text)
    shutil.copy(furnished / "rows.jsonl", tmp_path)
    answer = loratune("run", tmp_path / "study.yaml", "--out", tmp_path / "out", "--quiet")
    assert answer.code == 1
    assert "4 of 4 trials failed" in answer.err
    assert "adalora" in loratune("results", tmp_path / "out").out


# What bad input gets ------------------------------------------------------------------------------


BAD_STUDIES = {
    "unknown key": ("rank: 2", "rnak: 2", "did you mean 'rank'"),
    "malformed YAML": ("[8, 16]", "[8, 16", "malformed YAML"),
    "batch size 0": ("[8, 16]", "[0]", "batch_size: 0; give a whole number of at least 1"),
    "batch larger than the data": ("[8, 16]", "[41]", "batch_size=41 exceeds num_train_rows=40"),
    "LR 0": ("[1e-3, 1e-2]", "[0.0]", "learning rate 0; give a positive number"),
    "LR below 0": ("[1e-3, 1e-2]", "[-1e-3]", "learning rate -0.001; give a positive number"),
    "rank 0": ("rank: 2", "rank: 0", "rank: 0; give a whole number of at least 1"),
    "rank above the width": ("rank: 2", "rank: 33", "choose a rank from 1 to"),
    "unknown method": ("[lora, pissa]", "[lora, pisa]", "did you mean 'pissa'"),
    "field absent": ("prompt: question", "prompt: qestion", "question"),
    "target that matches no layer": ("all-linear", "[q_prj]", "q_proj"),
    "hold-out larger than the data": ("{rows: 8}", "{rows: 48}", "48"),
    "no such data file": ("rows.jsonl", "nothing.jsonl", "nothing.jsonl"),
    "no such model": ("model: model", "model: ./nowhere", "nowhere"),
    "grader of numbers for a task of programs": (
        "seeds: 2",
        "evaluate: {tasks: [{name: humaneval, grader: strict}]}\nseeds: 2",
        "task humaneval is not judged by grader strict; choose tests",
    ),
    "unknown task": ("seeds: 2", "evaluate: {tasks: [gsm8]}\nseeds: 2", "gsm8k"),
    "adaptive search without bounds": ("[1e-3, 1e-2]", "{search: adaptive}", "needs low and high"),
}


def is_clean_refusal(answer: Answer, out: Path, *said: str) -> None:
    assert answer.code == 2
    assert answer.out == ""
    assert "Traceback" not in answer.err
    lines = answer.err.splitlines()
    assert lines[0].startswith("loratune: ")
    assert len(lines) <= 2, answer.err
    for words in said:
        assert words in answer.err
    assert not out.exists()


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_a_bad_study_gets_a_clear_line_and_nothing_is_written(loratune, furnished, tmp_path, case):
    old, new, said = BAD_STUDIES[case]
    assert old in STUDY
    path = furnished / f"bad-{tmp_path.name}.yaml"
    path.write_text(STUDY.replace(old, new))
    answer = loratune("run", path, "--out", tmp_path / "out")
    is_clean_refusal(answer, tmp_path / "out", said)


BAD_ROWS = {
    "empty": ("", "rows.jsonl"),
    "no JSON": (rows(3) + "{question\n" + rows(40), "rows.jsonl, line 4"),
    "no object": (rows(3) + "[1]\n" + rows(40), "rows.jsonl, line 4"),
    "a field that one row lacks": (rows(30) + '{"question": "x"}\n', "answer"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_get_the_file_and_the_line(loratune, furnished, tmp_path, case):
    content, said = BAD_ROWS[case]
    (tmp_path / "rows.jsonl").write_text(content)
    text = STUDY.replace("model: model", f"model: {furnished / 'model'}")
    (tmp_path / "study.yaml").write_text(text)
    answer = loratune("run", tmp_path / "study.yaml", "--out", tmp_path / "out")
    is_clean_refusal(answer, tmp_path / "out", said)


def test_a_model_without_weights_or_with_pickles_is_refused(loratune, furnished, tmp_path):
    shutil.copytree(furnished, tmp_path / "copy", ignore=shutil.ignore_patterns("results", "out"))
    weights = tmp_path / "copy" / "model" / "model.safetensors"
    weights.unlink()
    answer = loratune("run", tmp_path / "copy" / "study.yaml", "--out", tmp_path / "out")
    is_clean_refusal(answer, tmp_path / "out", "weights")
    weights.with_name("pytorch_model.bin").write_bytes(b"\x80\x04.")
    answer = loratune("run", tmp_path / "copy" / "study.yaml", "--out", tmp_path / "out")
    is_clean_refusal(answer, tmp_path / "out", "pickle", "safetensors")


def test_a_missing_study_and_an_unknown_preset_are_refused(loratune, tmp_path):
    answer = loratune("run", tmp_path / "no.yaml", "--out", tmp_path / "out")
    is_clean_refusal(answer, tmp_path / "out", "no such file")
    answer = loratune("init", "fig11")
    is_clean_refusal(answer, tmp_path / "out", "fig1")


def test_a_device_that_is_not_here_is_refused(loratune, furnished, tmp_path):
    for device in ("cuda:99", "tpu", "mps"):
        answer = loratune(
            "run", furnished / "study.yaml", "--out", tmp_path / "out", "--device", device
        )
        is_clean_refusal(answer, tmp_path / "out", device)


def test_a_folder_of_another_study_is_refused_and_left_alone(loratune, furnished, finished):
    (furnished / "other.yaml").write_text(STUDY.replace("study: tiny", "study: other"))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    answer = loratune("run", furnished / "other.yaml", "--out", finished)
    assert answer.code == 2
    assert "holds study 'tiny', not 'other'" in answer.err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_an_unwritable_folder_is_refused(loratune, furnished, tmp_path):
    # Root may write into any folder, but nobody below a file.
    (tmp_path / "file").write_text("")
    answer = loratune("run", furnished / "study.yaml", "--out", tmp_path / "file" / "out")
    is_clean_refusal(answer, tmp_path / "file" / "out", "cannot be written")


def test_a_database_of_a_newer_version_is_refused_and_left_alone(loratune, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "newer")
    with sqlite3.connect(tmp_path / "newer" / "loratune.db") as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    connection.close()
    before = (tmp_path / "newer" / "loratune.db").read_bytes()
    for command in ("results", "recommend", "report"):
        answer = loratune(command, tmp_path / "newer")
        assert answer.code == 2
        assert "newer version" in answer.err
        assert "Traceback" not in answer.err
    assert (tmp_path / "newer" / "loratune.db").read_bytes() == before


def test_a_folder_that_is_no_results_folder_is_refused(loratune, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        for command in ("results", "cells", "recommend", "report", "compare"):
            answer = loratune(command, folder)
            assert answer.code == 2
            assert "loratune run STUDY.yaml --out DIR" in answer.err


def test_what_tune_left_where_only_the_proxy_was_searched_points_there(loratune, tmp_path):
    proxy = tmp_path / "out" / "proxy"
    proxy.mkdir(parents=True)
    (proxy / "study.yaml").write_text("study: searched\n", encoding="utf-8")
    (tmp_path / "out" / "proxy.json").write_text("{}", encoding="utf-8")
    for command in ("compare", "audit"):
        answer = loratune(command, tmp_path / "out")
        assert answer.code == 2, command
        assert "has searched its proxy alone" in answer.err
        assert str(proxy) in answer.err.replace("\n", "")
    (tmp_path / "file").touch()
    assert "is a file" in loratune("compare", tmp_path / "file").err


def test_a_second_store_for_one_folder_is_refused(loratune, furnished, finished, tmp_path):
    answer = loratune(
        "run", furnished / "study.yaml", "--out", finished, "--store", tmp_path / "other.db"
    )
    assert answer.code == 2
    assert "leave --store out" in answer.err
    assert not (tmp_path / "other.db").exists()


def test_data_whose_fields_cannot_be_told_lists_the_columns(loratune, furnished, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"left": "a", "right": "b"}\n' * 20)
    answer = loratune(
        "tune", "--model", furnished / "model", "--data", tmp_path / "odd.jsonl", "--out",
        tmp_path / "out",
    )  # fmt: skip
    is_clean_refusal(answer, tmp_path / "out", "left", "right")


# What is not imported -----------------------------------------------------------------------------


def test_answers_are_given_where_torch_cannot_be_imported(finished, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for arguments in (
        *(["recommend"], ["results"], ["cells"], ["compare"], ["report"], ["laws"], ["audit"]),
    ):
        command = [sys.executable, "-m", "loratune.cli", *arguments, str(finished)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "loratune.cli", "init", "fig1"]
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


# The reference engine goes on bit-equal. In a pack a trial may find other neighbours afterwards,
# and then differs by rounding: 1e-7 a product in float32, which 20 epochs of updates add up.
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "tolerance"), [("reference", 0.0), ("packed", 1e-4)])
def test_killed_at_twenty_random_moments_a_real_engine_ends_with_the_same_numbers(
    tmp_path, loratune, engine, tolerance
):
    furnish(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY.replace("epochs: 1", "epochs: 20"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "loratune.cli", "run", "study.yaml", "--quiet"),
        *("--engine", engine, "--out"),
    ]

    def start(folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, folder], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
        )

    started = time.monotonic()
    assert start("whole").wait() == 0
    whole_seconds = time.monotonic() - started
    chance = random.Random(11)
    process = start("killed")
    for _ in range(20):
        # Anywhere from the imports to most of the way through the study.
        time.sleep(chance.uniform(1.0, 0.5 * whole_seconds))
        process.kill()
        process.wait()
        process = start("killed")
    assert process.wait() == 0
    tables = []
    for folder in ("whole", "killed"):
        with open_store(str(tmp_path / folder / "loratune.db"), create=False) as store:
            tables.append(
                [
                    (
                        one.trial.trial_id,
                        one.status,
                        one.outcome.validation_loss,
                        one.outcome.losses,
                    )
                    for one in store.results("tiny")
                    if one.outcome is not None
                ]
            )
    assert len(tables[0]) == NUM_TRIALS
    for (*names, validation_loss, losses), (*others, loss, again) in zip(*tables, strict=True):
        assert names == others
        assert loss == pytest.approx(validation_loss, rel=tolerance, abs=0)
        assert again == pytest.approx(losses, rel=tolerance, abs=0)


@pytest.mark.parametrize("budget", ["2", "soon", "-1h", "0s"])
def test_a_budget_without_a_unit_or_a_positive_time_is_refused(loratune, furnished, budget):
    answer = loratune(
        "tune", "--model", "demo:4m", "--data", "demo:task", "--out", furnished / "refused",
        "--budget", budget,
    )  # fmt: skip
    assert answer.code == 2
    assert "such as 2h" in answer.err or "for example 2h" in answer.err
    assert "Traceback" not in answer.err
    assert not (furnished / "refused").exists()


# Laws, lemma, audit -------------------------------------------------------------------------------


def test_laws_of_a_small_study_say_what_cannot_be_concluded(loratune, finished):
    answer = json.loads(loratune("laws", finished, "--json").out)
    assert answer["metric"] == "validation_loss"
    assert [one["method"] for one in answer["learning_rate"]] == ["lora", "pissa"]
    for one in answer["learning_rate"]:
        assert one["fit"] is None
        assert "it takes 5" in one["undecided"][0]
    assert answer["not_varied"] == ["rows", "rank", "model"]
    text = loratune("laws", finished).out
    assert "cannot be concluded" in text
    assert "to run: " in text


def test_the_lemma_has_the_keys_that_others_rely_on(loratune):
    answer = loratune("lemma", "--rank", "64", "--samples", "1000", "--replicates", "200", "--json")
    found = json.loads(answer.out)
    keys = ["rank", "samples", "mean", "median", "formula_mean", "formula_median", "replicates"]
    assert [key for key in keys if key not in found] == []
    assert found["formula_mean"] == pytest.approx(1032.3, abs=0.05)
    assert found["formula_median"] == pytest.approx(1010.5, abs=0.05)
    # 200 replicates: the standard error is 1.3% of the mean, 1.6% of the median; four of them.
    assert found["mean"] == pytest.approx(1032.3, rel=0.055)
    assert found["median"] == pytest.approx(1010.5, rel=0.065)
    assert found["plugin"] is None


def test_the_lemma_is_seeded_and_speaks_plainly(loratune):
    arguments = ("lemma", "--rank", "2", "--samples", "40", "--replicates", "50")
    one = loratune(*arguments, "--seed", "3", "--noise-scale", "500")
    assert one.out == loratune(*arguments, "--seed", "3", "--noise-scale", "500").out
    assert one.out != loratune(*arguments, "--seed", "4", "--noise-scale", "500").out
    assert "has no mean" in one.out
    assert "1 / (1 / B_true + 1 / N) = 37.04" in one.out
    found = json.loads(loratune(*arguments, "--json").out)
    assert (found["mean"], found["formula_mean"]) == (None, None)


def test_the_default_number_of_replicates_is_the_functions():
    command = get_command(cli.app).commands["lemma"]  # type: ignore[attr-defined]
    (option,) = [one for one in command.params if one.name == "replicates"]
    assert option.default == DEFAULT_REPLICATES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rank", "0", "--samples", "10"], "rank=0"),
        (["--rank", "4", "--samples", "1"], "samples=1"),
        (["--rank", "4", "--samples", "10", "--replicates", "1"], "replicates=1"),
        (["--rank", "4", "--samples", "10", "--noise-scale", "nan"], "true_noise_scale=nan"),
        (["--rank", "four", "--samples", "10"], "valid integer"),
    ],
)
def test_the_lemma_refuses_what_it_cannot_draw(loratune, arguments, said):
    answer = loratune("lemma", *arguments)
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err


def test_an_audit_reads_a_results_folder_and_its_csv_alike(loratune, finished, tmp_path):
    folder = json.loads(loratune("audit", finished, "--json").out)
    (tmp_path / "table.csv").write_text(loratune("results", finished).out)
    table = json.loads(loratune("audit", tmp_path / "table.csv", "--json").out)
    assert folder["num_rows"] == table["num_rows"] == NUM_TRIALS
    assert [one["what"] for one in folder["findings"]] == [one["what"] for one in table["findings"]]
    # two rates: the best one is always at an edge
    assert folder["findings"][0]["kind"] == "learning_rate_edge"


def test_an_audit_of_pefts_published_results_finds_what_is_in_them(loratune):
    folder = Path(__file__).parent / "analyse" / "audit" / "peft_results"
    answer = loratune("audit", folder)
    assert answer.code == 0
    assert "63 runs of 44 methods" in answer.out
    assert "44 of 44 methods were tried at one batch size only (batch size 4)" in answer.out
    assert "to do: " in answer.out
    assert loratune("audit", folder).out == answer.out


def test_an_audit_takes_a_map(loratune, tmp_path):
    (tmp_path / "t.csv").write_text("Adapter,B\nlora,4\npissa,4\n")
    answer = loratune("audit", tmp_path / "t.csv", "--map", "Adapter=method", "--map", "B=seed")
    assert answer.code == 2
    assert "none of 2 runs has a score" in answer.err
    answer = loratune(
        "audit", tmp_path / "t.csv", "--map", "Adapter=method", "--map", "B=validation_loss"
    )
    assert answer.code == 0
    assert "Not checked: one_seed" in answer.out


@pytest.mark.parametrize(
    ("name", "content", "arguments", "said"),
    [
        ("t.csv", b"method,seed\nlora,0\n", ["--map", "acc=test_accuracy"], "no column 'acc'"),
        ("t.csv", b"method,seed\nlora,0\n", ["--map", "seed=sede"], "unknown field 'sede'"),
        ("t.csv", b"method,seed\nlora,0\n", ["--map", "seed"], "COLUMN=FIELD"),
        ("t.csv", b"method,rank\nlora,big\n", [], "line 2: rank is 'big'; expected a number"),
        ("t.csv", b"", [], "is empty"),
        ("t.pkl", b"\x80\x04N.", [], "pickle"),
        ("t.csv", b"\x80\x04N.", [], "pickle"),
        ("t.json", b"[1", [], "no JSON"),
        ("t.txt", b"hello\n", [], "no rows"),
        ("none.csv", None, [], "does not exist"),
    ],
)
def test_an_audit_refuses_what_it_cannot_read(loratune, tmp_path, name, content, arguments, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    answer = loratune("audit", tmp_path / name, *arguments)
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""


def test_laws_refuse_what_is_no_results_folder(loratune, tmp_path):
    answer = loratune("laws", tmp_path)
    assert answer.code == 2
    assert "is no results folder" in answer.err

"""PEFT's published results: 63 files whose authors never saw the detectors."""

import json
import shutil
from pathlib import Path

import pytest

from loratune.analyse.audit.from_peft import read_peft
from loratune.analyse.audit.inspect import audit_table
from loratune.analyse.audit.reading import read_table
from loratune.errors import AnalysisError, DataError

FOLDER = Path(__file__).parent / "peft_results"
LORA = FOLDER / "lora--llama-3.2-3B-rank32.json"


@pytest.fixture(scope="module")
def table():
    return read_table(FOLDER, columns={})


@pytest.fixture(scope="module")
def findings(table):
    return {one.kind: one for one in audit_table(table).findings}


def test_a_file_is_read_as_it_stands(table):
    (row,) = [one for one in table.rows if one.where == LORA.name]
    assert (row.method, row.rank, row.alpha, row.scale) == ("lora", 32, 64, 2.0)
    assert (row.batch_size, row.learning_rate, row.seed) == (4, 1e-4, 0)
    assert (row.num_updates, row.num_samples) == (5000, 20_000)
    # The published accuracy of the first table that quotes it is .478.
    assert row.tests[0].accuracy == pytest.approx(0.478, abs=5e-4)
    assert row.tests[0].total == 1319
    assert row.validation_accuracy is not None


def test_variants_of_lora_are_methods_of_their_own(table):
    scales = {row.method: row.scale for row in table.rows if row.scale is not None}
    assert scales["lora(use_dora)"] == 2.0
    assert scales["lora(use_rslora)"] == 8.0  # 64 / sqrt(64)
    assert scales["adalora"] == 0.125  # starts with init_r = 64, alpha 8
    assert "lora(init=mica)" in scales


def test_what_is_found_in_the_published_results(findings):
    assert set(findings) == {
        "unequal_budgets", "learning_rate_edge", "one_learning_rate", "one_batch_size", "one_seed",
        "unequal_scale", "below_detectable",
    }  # fmt: skip
    assert findings["one_batch_size"].num_rows == 63
    assert dict(findings["one_batch_size"].numbers)["batch_sizes"] == "4"
    assert dict(findings["one_seed"].numbers)["num_methods"] == 44
    assert dict(findings["one_learning_rate"].numbers)["num_methods"] == 38
    budgets = dict(findings["unequal_budgets"].numbers)
    assert (budgets["configurations of lora"], budgets["configurations of adalora"]) == (3, 1)
    close = dict(findings["below_detectable"].numbers)
    assert (close["leader"], close["num_not_told_from_leader"]) == ("lily", 7)
    assert close["num_pairs"] == 44 * 43 / 2


def test_the_closest_rival_is_the_one_that_the_files_say(findings):
    # By hand: lily 694/1319 = .5262 (rank 140), hira 677/1319 = .5133; 17 questions apart.
    close = dict(findings["below_detectable"].numbers)
    assert close["difference"] == pytest.approx(17 / 1319)


def test_their_batches_are_what_they_say(table):
    answer = audit_table(table)
    assert not [one for one in answer.findings if one.kind == "batch_size_mismatch"]
    assert [one.kind for one in answer.not_checked] == ["seeds_change_nothing"]
    assert any("weight decay is not the same" in remark for remark in answer.remarks)


def changed(folder: Path, change) -> Path:
    content = json.loads(LORA.read_text())
    change(content)
    (folder / "one.json").write_text(json.dumps(content))
    return folder


def test_a_failed_run_is_no_result(tmp_path):
    changed(tmp_path, lambda content: content["train_info"].update(status="failed"))
    with pytest.raises(AnalysisError, match="none of 1 runs has a score"):
        audit_table(read_table(tmp_path, columns={}))


def test_a_batch_that_was_not_what_it_says_is_found(tmp_path):
    changed(
        tmp_path,
        lambda content: content["train_info"]["metrics"][-1].update({"train samples": 5000}),
    )
    kinds = [one.kind for one in audit_table(read_table(tmp_path, columns={})).findings]
    assert "batch_size_mismatch" in kinds


def test_an_accuracy_that_is_no_count_of_gsm8k_leaves_the_number_of_questions_open(tmp_path):
    changed(
        tmp_path,
        lambda content: content["train_info"]["metrics"][-1].update({"test accuracy": 0.5}),
    )
    shutil.copy(LORA, tmp_path)
    table = read_table(tmp_path, columns={})
    assert {row.tests[0].total for row in table.rows} == {None}


@pytest.mark.parametrize("accuracy", [float("nan"), 47.8, -1, "much", None])
def test_an_accuracy_that_is_no_fraction_is_refused(tmp_path, accuracy):
    changed(
        tmp_path,
        lambda content: content["train_info"]["metrics"][-1].update({"test accuracy": accuracy}),
    )
    with pytest.raises(DataError, match="expected a fraction"):
        read_table(tmp_path, columns={})


def test_one_file_alone_can_be_read():
    assert read_table(LORA, columns={}).rows[0].method == "lora"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no JSON"),
        ("not json", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no PEFT result file"),
        ("{}", "no PEFT result file"),
        ('{"run_info": {}, "train_info": {}}', "no PEFT result file"),
        ('{"run_info": 3, "train_info": {}}', "no PEFT result file"),
    ],
)
def test_other_json_is_refused_with_its_name(tmp_path, content, said):
    (tmp_path / "one.json").write_text(content)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path, columns={})
    assert said in str(caught.value)
    assert "one.json" in str(caught.value)


def test_huge_or_too_many_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    with path.open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(DataError, match="at most 16 MiB"):
        read_peft([path])
    monkeypatch.setattr("loratune.analyse.audit.from_peft.MOST_FILES", 2)
    with pytest.raises(DataError, match="at most 2 are read"):
        read_peft([path] * 3)

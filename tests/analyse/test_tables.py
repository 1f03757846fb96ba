import io
import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import pandas as pd
import pyarrow.parquet as pq

from loratune.analyse.tables import results_table, table_bytes
from loratune.records import ScoreRecord
from loratune.study.methods import choose
from simulated import result, score

# DESIGN's own list, by hand, and what came after it.
COLUMNS = [
    "trial_id",
    "study",
    "status",
    "method",
    "model",
    "rank",
    "alpha",
    "targets",
    "batch_size",
    "learning_rate",
    "seed",
    "protocol",
    "epochs",
    "num_train_rows",
    "schedule",
    "warmup_steps",
    "beta2",
    "precision",
    "data_fingerprint",
    "select_on",
    "num_updates",
    "train_loss",
    "validation_loss",
    "seconds",
    "tokens",
    "peak_memory_bytes",
    "engine",
    "error",
    "purpose",
]


def test_the_columns_are_the_promised_ones_in_order():
    assert list(results_table([result()]).columns) == COLUMNS
    assert list(results_table([]).columns) == COLUMNS


def test_task_columns_stand_between_the_losses_and_seconds():
    table = results_table(
        [
            result(scores=[score("validation", 5, 8, split="validation"), score("gsm8k", 3, 10)]),
            result(seed=1),
        ]
    )
    names = list(table.columns)
    start = names.index("validation_loss") + 1
    assert names[start : start + 7] == [
        "validation_accuracy",
        "validation_correct",
        "validation_total",
        "gsm8k_accuracy",
        "gsm8k_correct",
        "gsm8k_total",
        "seconds",
    ]
    assert table["gsm8k_accuracy"].tolist() == [0.3, pd.NA]
    assert table["gsm8k_correct"].tolist() == [3, pd.NA]


def test_a_planned_trial_has_nulls_and_no_zeros():
    row = json.loads(table_bytes(results_table([result(status="planned")]), format="json"))[0]
    for name in ("num_updates", "train_loss", "validation_loss", "seconds", "tokens", "engine"):
        assert row[name] is None
    assert row["status"] == "planned"


def test_fixed_steps_have_no_epochs_and_options_stand_in_the_label():
    other = choose("loraplus", {"ratio": 8.0})
    table = results_table([result(steps=20, method=other), result(method="loraplus")])
    assert table["epochs"].tolist() == [pd.NA, 1.0]
    assert table["method"].tolist() == ["loraplus(ratio=8)", "loraplus"]
    assert table["targets"].tolist() == ["q_proj+v_proj"] * 2


def test_nan_is_not_null_in_csv_and_parquet_and_null_in_json():
    done = result(0.1 + 0.2)
    nan = result(math.nan, status="diverged", seed=1)
    table = results_table([done, nan, result(status="planned", seed=2)])
    lines = table_bytes(table, format="csv").decode().splitlines()
    index = list(table.columns).index("train_loss")
    assert [line.split(",")[index] for line in lines[1:]] == ["0.30000000000000004", "nan", ""]
    assert [row["train_loss"] for row in json.loads(table_bytes(table, format="json"))] == [
        0.30000000000000004,
        None,
        None,
    ]
    column = pq.read_table(io.BytesIO(table_bytes(table, format="parquet")))["train_loss"]
    assert column.null_count == 1
    assert math.isnan(column[1].as_py())
    assert column[0].as_py() == 0.30000000000000004


def test_every_float_comes_back_with_the_same_bits():
    values = [1 / 3, 1e-310, 2.0**-52 + 1, 1e22, 3e-4]
    table = results_table([result(value, seed=seed) for seed, value in enumerate(values)])
    index = list(table.columns).index("validation_loss")
    csv_lines = table_bytes(table, format="csv").decode().splitlines()[1:]
    assert [float(line.split(",")[index]) for line in csv_lines] == values
    rows = json.loads(table_bytes(table, format="json"))
    assert [row["validation_loss"] for row in rows] == values


def test_the_reason_of_a_divergence_stands_under_error():
    table = results_table([result(math.nan, status="diverged", reason="loss is nan")])
    assert table["error"].tolist() == ["loss is nan"]


def test_all_scores_add_the_ones_that_are_not_the_studys_choice():
    chosen, other = score("gsm8k", 3, 10), score("gsm8k", 4, 10, grader="pissa")
    newer = replace(other, correct=5, wrong=5)
    one = result(scores=[chosen])
    now = datetime(2026, 1, 1, tzinfo=UTC)
    records = [
        ScoreRecord(index, one.trial.trial_id, value, now)
        for index, value in enumerate((chosen, other, newer))
    ]
    table = results_table([one], all_scores=records)
    extra = [name for name in table.columns if name not in COLUMNS and "[" in name]
    assert extra == [
        f"gsm8k[pissa,1,greedy,test]_{part}" for part in ("accuracy", "correct", "total")
    ]
    assert table[extra[0]].tolist() == [0.5]
    assert list(table.columns)[-5:] == COLUMNS[-5:]

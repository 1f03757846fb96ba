import pickle
from pathlib import Path

import pytest

from audit_tables import clean_rows, write
from loratune.analyse.audit.from_csv import FIELDS, parse_map, read_csv
from loratune.analyse.audit.inspect import audit_table
from loratune.analyse.audit.reading import read_table
from loratune.errors import AnalysisError, DataError

LOG = Path(__file__).parents[3] / "docs" / "log"


def file(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_our_own_results_need_no_map():
    table = read_csv(LOG / "fig1-smollm2-results.csv", columns={})
    assert len(table.rows) == 279
    first = table.rows[0]
    assert (first.method, first.rank, first.scale, first.batch_size) == ("lora", 32, 1.0, 2)
    assert (first.learning_rate, first.seed, first.num_updates) == (1e-4, 0, 2048)
    assert first.select_on == "validation_loss"


def test_the_log_of_experiments_says_of_itself_what_the_audit_finds():
    # docs/log.md: "LoRA's best learning rate is the highest tried and PiSSA's the lowest ...
    # One seed"; three of nine cells of milora are inside.
    found = audit_table(read_csv(LOG / "smollm2-gsm8k-results.csv", columns={}))
    assert [(one.kind, one.methods) for one in found.findings] == [
        ("learning_rate_edge", ("lora",)),
        ("learning_rate_edge", ("pissa",)),
        ("one_seed", ("lora", "pissa", "milora")),
    ]


def test_columns_of_any_name_are_mapped_and_percents_are_seen(tmp_path):
    path = file(
        tmp_path, "Adapter;x,LR,bs,acc (%),n\nLoRA,1e-4,16,47.8,1319\nDoRA,2e-4,32,50,1319\n"
    )
    columns = parse_map(
        ["Adapter;x=method", "LR=learning_rate", "bs=batch_size", "acc (%)=gsm8k_accuracy",
         "n=gsm8k_total"]
    )  # fmt: skip
    table = read_csv(path, columns=columns)
    assert table.rows[0].tests[0].accuracy == pytest.approx(0.478)
    assert table.rows[1].tests[0].total == 1319
    assert table.rows[1].batch_size == 32
    assert "taken as percent" in table.remarks[0]


def test_a_map_wins_over_a_column_of_our_name(tmp_path):
    path = file(tmp_path, "method,batch_size,real_batch\nlora,4,16\n")
    table = read_csv(path, columns={"real_batch": "batch_size"})
    assert table.rows[0].batch_size == 16


def test_absent_is_not_zero(tmp_path):
    path = file(tmp_path, "method,seed,validation_loss,gsm8k_accuracy\nlora,,,\nlora,0,0,0\n")
    empty, zero = read_csv(path, columns={}).rows
    assert (empty.seed, empty.validation_loss, empty.tests) == (None, None, ())
    assert not empty.tried
    assert (zero.seed, zero.validation_loss, zero.tests[0].accuracy) == (0, 0.0, 0.0)
    assert zero.tried


def test_failed_runs_are_no_configurations_and_diverged_ones_are(tmp_path):
    path = file(
        tmp_path,
        "method,status,validation_loss\nlora,failed,\nlora,diverged,\nlora,done,nan\nlora,done,1\n"
        "lora,stopped,2\n",
    )
    rows = read_csv(path, columns={}).rows
    assert [row.tried for row in rows] == [False, True, True, True, True]
    assert [row.ended for row in rows] == [False, False, False, True, False]
    assert [row.diverged for row in rows] == [False, True, True, False, False]


def test_a_byte_order_mark_quotes_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes('\ufeffmethod,model\r\n"lora, tuned",m\r\n\r\npissa,m\r\n'.encode())
    assert [row.method for row in read_csv(path, columns={}).rows] == ["lora, tuned", "pissa"]


def test_a_purpose_that_is_none_of_ours_is_taken_as_absent_and_said(tmp_path):
    text = "method,seed,purpose\nlora,0,ablation\nlora,1,main\nlora,2,\nlora,3,adaptive\n"
    table = read_csv(file(tmp_path, text), columns={})
    assert [row.is_searched for row in table.rows] == [False, False, False, True]
    assert table.remarks == (
        "purpose 'ablation', 'main' is taken as absent: it is none of ours "
        "(search, adaptive, confirm)",
    )
    many = "".join(f"lora,{letter}\n" for letter in "abcd")
    (remark,) = read_csv(file(tmp_path, f"method,purpose\n{many}"), columns={}).remarks
    assert remark.startswith("purpose 'a', 'b', 'c' and others is taken")


def test_rows_that_confirm_are_left_out_and_counted(tmp_path):
    text = "method,seed,purpose\nlora,0,search\nlora,1,confirm\nlora,2,confirm\n"
    table = read_csv(file(tmp_path, text), columns={})
    assert [row.seed for row in table.rows] == [0]
    assert table.remarks == (
        "2 of 3 rows are left out: by their purpose, confirm, they choose nothing",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n\n", "no rows"),
        ("method,seed\n", "no rows"),
        ("name,seed\nlora,0\n", "--map COLUMN=method"),
        ("method;seed\nlora;0\n", "--map COLUMN=method"),
        ("method,seed\nlora\n", "line 2: 1 values under 2 columns"),
        ("method,method\nlora,x\n", "there twice"),
        ("method,seed\n,0\n", "line 2: no method"),
        ("method,seed\nlora,zero\n", "line 2: seed is 'zero'; expected a number"),
        ("method,seed\nlora,1.5\n", "expected a whole number"),
        ("method,batch_size\nlora,0\n", "1 or more"),
        ("method,rank\nlora,-1\n", "1 or more"),
        ("method,learning_rate\nlora,0\n", "more than 0"),
        ("method,learning_rate\nlora,nan\n", "finite"),
        ("method,seed\nlora,inf\n", "finite"),
        ("method,gsm8k_accuracy\nlora,-0.1\n", "fraction from 0 to"),
        ("method,gsm8k_accuracy\nlora,101\n", "fraction from 0 to"),
        ("method,gsm8k_accuracy,gsm8k_total\nlora,0.5,0\n", "1 or more"),
        ("method,select_on\nlora,luck\n", "expected validation_loss"),
        ('method,seed\n"lora,0\n', "no CSV"),
    ],
)
def test_bad_content_is_refused_with_its_place_and_what_to_do(tmp_path, text, said):
    with pytest.raises(DataError) as caught:
        read_csv(file(tmp_path, text), columns={})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["acc"], "expected COLUMN=FIELD"),
        (["=method"], "expected COLUMN=FIELD"),
        (["acc="], "expected COLUMN=FIELD"),
        (["acc=accurracy"], "unknown field 'accurracy'"),
        (["a=method", "b=method"], "mapped twice"),
        (["a=method", "a=seed"], "mapped twice"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(pairs, said):
    with pytest.raises(DataError) as caught:
        parse_map(pairs)
    assert said in str(caught.value)


def test_a_column_may_hold_an_equals_sign_and_every_field_can_be_mapped():
    assert parse_map(["lr=1e-4=learning_rate"]) == {"lr=1e-4": "learning_rate"}
    for field in (*FIELDS, "gsm8k_accuracy", "human-eval_total"):
        assert parse_map([f"x={field}"]) == {"x": field}


def test_a_column_that_is_not_there_is_named_beside_those_that_are(tmp_path):
    path = write(tmp_path / "table.csv", clean_rows())
    with pytest.raises(DataError, match=r"no column 'acc'; it has 'method', 'model'"):
        read_csv(path, columns={"acc": "gsm8k_accuracy"})


def test_pickles_and_other_binary_files_are_never_opened_as_such(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("table.pkl", "table.csv"):
        for protocol in (0, 4):
            (tmp_path / name).write_bytes(pickle.dumps([Bomb()], protocol=protocol))
            with pytest.raises(DataError) as caught:
                read_table(tmp_path / name, columns={})
            assert "Traceback" not in str(caught.value)
            if name == "table.pkl" or protocol == 4:
                assert "pickle" in str(caught.value)
    (tmp_path / "table.csv").write_bytes(b"method\n\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_table(tmp_path / "table.csv", columns={})
    assert not (tmp_path / "exploded").exists()


def test_control_characters_reach_no_terminal(tmp_path):
    with pytest.raises(DataError, match="no text"):
        read_csv(file(tmp_path, "method,seed\nlora\x1b[31m,0\n"), columns={})


def test_a_column_that_names_every_run_is_not_the_method(tmp_path):
    path = file(
        tmp_path, "method,seed,validation_loss\n" + "".join(f"m{n},0,1\n" for n in range(600))
    )
    with pytest.raises(AnalysisError, match="does the right column name the method"):
        audit_table(read_csv(path, columns={}))


def test_a_line_separator_of_unicode_is_no_new_row(tmp_path):
    path = file(tmp_path, "method,seed\nlo\u2028ra,0\n")
    assert len(read_csv(path, columns={}).rows) == 1


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.truncate(101 * 2**20)  # sparse: nothing is written
    with pytest.raises(DataError, match="at most 100 MiB"):
        read_table(path, columns={})


def test_too_many_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("loratune.analyse.audit.from_csv.MOST_ROWS", 10)
    with pytest.raises(DataError, match="more than 10 rows"):
        read_csv(write(tmp_path / "table.csv", clean_rows()), columns={})


def test_a_field_larger_than_csv_allows_is_a_clear_line(tmp_path):
    with pytest.raises(DataError, match="no CSV"):
        read_csv(file(tmp_path, "method,seed\n" + "x" * 200_000 + ",0\n"), columns={})


def test_nothing_to_audit_is_said(tmp_path):
    path = file(tmp_path, "method,status\nlora,failed\n")
    with pytest.raises(AnalysisError, match="none of 1 runs has a score"):
        audit_table(read_csv(path, columns={}))


def test_what_is_not_there_or_is_no_source_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_table(tmp_path / "nothing.csv", columns={})
    with pytest.raises(DataError, match="holds neither"):
        read_table(tmp_path, columns={})
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(DataError, match="--map names columns of a CSV"):
        read_table(tmp_path, columns={"a": "method"})


@pytest.mark.parametrize("values", [(0.4, 0.5, 1.2), (50, 0.6), (0.9, 90, 91, 0.8)])
def test_fractions_and_percents_in_one_column_are_refused_with_their_lines(tmp_path, values):
    rows = "".join(f"lora,{value}\n" for value in values)
    with pytest.raises(DataError, match=r"gsm8k_accuracy is .* in line \d+ and .* in line \d+"):
        read_csv(file(tmp_path, f"method,gsm8k_accuracy\n{rows}"), columns={})


def test_a_small_percentage_among_percents_is_one(tmp_path):
    table = read_csv(file(tmp_path, "method,gsm8k_accuracy\nlora,48\nlora,0.4\nlora,51\n"),
                     columns={})  # fmt: skip
    assert table.rows[1].tests[0].accuracy == pytest.approx(0.004)

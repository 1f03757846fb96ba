import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError

from loratune.data.demo_task import generate_rows
from loratune.data.sources import read_rows, source_name
from loratune.errors import DataError
from loratune.study.schema import Source, source_of

ROWS = [
    {"question": "1, 2 or \u2028 3?", "answer": "007"},
    {"question": 'a "quoted"\nline', "answer": "1.50"},
]


def read(path: Path, content: str | bytes) -> list[dict]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(Source(file=path.name), folder=path.parent)


@pytest.fixture
def csv_text() -> str:
    return 'question,answer\n"1, 2 or \u2028 3?",007\n"a ""quoted""\nline",1.50\n'


def test_the_same_rows_come_out_of_every_format(tmp_path, csv_text):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")

    assert read(tmp_path / "d.jsonl", lines + "\n\n") == ROWS
    assert read(tmp_path / "d.json", json.dumps(ROWS)) == ROWS
    assert read(tmp_path / "e.json", json.dumps({"version": 1, "data": ROWS})) == ROWS
    assert read(tmp_path / "d.csv", csv_text) == ROWS
    assert read_rows(Source(file="d.parquet"), folder=tmp_path) == ROWS


def test_compressed_texts_are_read_as_they_are_shipped(tmp_path, csv_text):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for name, text in (("d.jsonl", lines), ("d.json", json.dumps(ROWS)), ("d.csv", csv_text)):
        content = gzip.compress(text.encode())
        assert read(tmp_path / f"{name}.gz", content) == ROWS
        assert source_of(f"{name}.gz") == {"file": f"{name}.gz"}
        for damaged in (text.encode(), content[:-9], content[:20] + b"x" * 9):
            with pytest.raises(DataError, match=f"{name}.gz is no whole gzip file"):
                read(tmp_path / f"{name}.gz", damaged)


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path, csv_text):
    lines = "\r\n".join(json.dumps(row) for row in ROWS)

    assert read(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + lines.encode()) == ROWS
    assert read(tmp_path / "d.csv", b"\xef\xbb\xbf" + csv_text.encode()) == ROWS


def test_an_absolute_path_ignores_the_folder(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": 1}')

    rows = read_rows(Source(file=str(tmp_path / "d.jsonl")), folder=Path("elsewhere"))

    assert rows == [{"a": 1}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": \n', "d.jsonl, line 2: no JSON"),
        ("d.jsonl", '{"a": 1}\n\n[1, 2]\n', "d.jsonl, line 3: a row is an object .* this is list"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "d.jsonl, line 2: byte 0xff is no UTF-8"),
        ("d.jsonl", "\n\n", "d.jsonl holds no rows"),
        ("d.json", "[]", "d.json holds no rows"),
        ("d.json", '[{"a": 1},\n {"a": 2}', "d.json, line 2: no JSON"),
        ("d.json", '{"a": 1}\n{"a": 2}', "one object a line is a .jsonl file"),
        ("d.json", '[{"a": 1}, null]', "d.json, row 2: a row is an object .* this is null"),
        ("d.json", '{"a": [], "b": []}', "one object with 2 lists"),
        ("d.json", '"text"', "holds a str"),
        ("d.json", "[" * 100_000, "nested too deeply"),
        ("d.csv", "a,b\n", "d.csv holds no rows"),
        ("d.csv", "", "d.csv holds no rows"),
        ("d.csv", "a,b\n1,2\n1,2,3\n", "d.csv, line 3: 3 cells under 2 columns"),
        ("d.csv", "a,a\n1,2\n", "d.csv, line 1: column 'a' stands twice"),
        ("d.csv", 'a,b\n1,"2\n', "d.csv, line 2: no CSV"),
        ("d.parquet", b"PAR", "d.parquet is no Parquet file that can be read"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_with_its_place(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_an_unknown_ending_are_told_apart(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()

    with pytest.raises(DataError, match=r"absent.jsonl does not exist"):
        read_rows(Source(file="absent.jsonl"), folder=tmp_path)
    with pytest.raises(DataError, match=r"folder.jsonl is a folder"):
        read_rows(Source(file="folder.jsonl"), folder=tmp_path)
    with pytest.raises(DataError, match=r"d.txt has an unknown ending; use .jsonl"):
        read_rows(Source(file="d.txt"), folder=tmp_path)


def test_a_csv_cell_may_be_longer_than_the_csv_module_likes(tmp_path):
    assert read(tmp_path / "d.csv", "a\n" + "x" * 200_000)[0]["a"] == "x" * 200_000


def test_the_demo_task_begins_with_its_first_rows(tmp_path):
    rows = read_rows(Source(demo="task"), folder=tmp_path)

    assert rows[:5] == generate_rows(5, seed=0)
    assert len(rows) > 4000


def test_a_hub_id_is_loaded_with_its_subset_and_split(tmp_path, monkeypatch):
    asked = []

    def load(*args, **named):
        asked.append((args, named))
        return datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "hi"}]}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source(id="openai/gsm8k", subset="main", split="test")

    rows = read_rows(source, folder=tmp_path)

    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert rows == [{"messages": [{"role": "user", "content": "hi"}]}]
    assert source_name(source) == "openai/gsm8k:main:test"


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach\nthe hub"),
        ValueError("Unknown split"),
        DatasetNotFoundError("does not exist"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_a_hub_id_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch, failure):
    def load(*args, **named):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load)

    with pytest.raises(
        DataError, match=r"'some/set:train' cannot be loaded: .* local file"
    ) as info:
        read_rows(Source(id="some/set"), folder=tmp_path)
    assert "\n" not in str(info.value)
    assert info.value.__cause__ is failure

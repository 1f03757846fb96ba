import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from loratune.errors import AnalysisError
from loratune.records import DataSummary, Provenance, StudyRecord
from loratune.report.page import write_report
from simulated import result, score, sweep

STUDY = StudyRecord("demo", "study: demo  # <b>&\n", "validation_loss", "2026-01-01T00:00:00Z")
SUMMARY = DataSummary("demo:task", 700, 3, 0, 128, 120, 57, 512, 4, (("gsm8k", 2),))
RUN = Provenance("reference", "cpu", (("torch", "2.13.0"),), "abc123", "host", 1)


def loss(size, rate, seed):
    return 1.0 + rate + 0.01 * seed + 0.001 * abs(size - 16)


def written(folder, results, study=STUDY):
    paths = write_report(
        folder, study=study, results=results, summaries={"data-demo": SUMMARY}, provenances=[RUN]
    )
    return paths, paths.page.read_text(encoding="utf-8")


class Ids(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids = []
        self.references = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                self.references.append(value)


def test_the_page_opens_offline_and_its_ids_are_its_own(tmp_path):
    paths, page = written(tmp_path, sweep(loss, learning_rates=(1e-4, 1e-3)))
    found = Ids()
    found.feed(page)
    assert len(found.ids) == len(set(found.ids))
    assert all(one.startswith("#") and one[1:] in found.ids for one in found.references)
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(paths.figures) == 9
    assert all(path.stat().st_size > 0 for path in paths.figures)


def test_the_same_store_gives_the_same_bytes(tmp_path):
    results = sweep(loss)
    first, _ = written(tmp_path / "a", results)
    second, _ = written(tmp_path / "b", results)
    assert first.page.read_bytes() == second.page.read_bytes()
    for one, two in zip(first.figures, second.figures, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_the_answer_comes_first_and_everything_is_accounted_for(tmp_path):
    _, page = written(tmp_path, sweep(loss) + sweep(loss, method="pissa"))
    assert page.index("Use batch size 16") < page.index("<figure")
    assert "pissa against lora" in page
    assert "2 training rows of demo:task have the question of a gsm8k test question" in page
    assert "reference (54 trials)" in page
    assert "2.13.0" in page
    assert "The same everywhere: status done, model demo:1m, rank 8" in page
    assert "study: demo  # &lt;b&gt;&amp;" in page
    assert "SELECTED" not in page


def test_selection_on_the_test_set_is_loud(tmp_path):
    results = [
        result(batch_size=size, learning_rate=rate, seed=seed, select_on="test",
               scores=[score("gsm8k", 50 + seed, 100)])
        for size in (4, 16) for rate in (1e-4, 1e-3) for seed in (0, 1)
    ]  # fmt: skip
    _, page = written(tmp_path, results, replace(STUDY, select_on="test"))
    assert '<p class="loud">Selected on the test set' in page
    assert page.index('loud">') < page.index("The answer")
    assert "by chance alone" in page


@pytest.mark.parametrize(
    "results", [[], [result(status="planned")], sweep(lambda *_: float("nan"))]
)
def test_a_study_without_a_score_still_has_a_page(tmp_path, results):
    paths, page = written(tmp_path, results)
    assert paths.figures == ()
    assert "Nothing to draw yet" in page


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AnalysisError, match="choose a writable folder"):
        written(tmp_path / "file", sweep(loss))

"""The parity benchmark in miniature: in float32 both ways answer alike, and it goes on."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune import api
from tiny_models import save_tiny
from tiny_studies import study_by_heart


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of the benchmarks folder, which is no package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module("decoding_parity")


def test_both_ways_are_asked_once_and_agree_in_float32(tmp_path, monkeypatch, capsys, parity):
    asked = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(1, 9)]
    rows = [{"q": one["question"], "a": one["answer"]} for one in asked]
    for name, content in (("rows", rows), ("test", asked)):
        text = "".join(json.dumps(one) + "\n" for one in content)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    model, out = save_tiny(tmp_path, "llama"), tmp_path / "out"
    study = study_by_heart(
        tmp_path, model=model, rows=tmp_path / "rows.jsonl", rates="[1e-2]", seeds=3
    )
    api.run(api.load_study(study), out=out, device="cpu", quiet=True)
    kept = tmp_path / "parity.json"
    arguments = [out, "--data", tmp_path / "test.jsonl", "--adapters", 3]
    arguments += ["--max-new-tokens", 9, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["x", *map(str, arguments), "--json", str(kept)])
    # The texts are equal, but eight questions cannot show that others would be.
    assert parity.main() == parity.EXIT_CODES[parity.UNDECIDED]
    found = json.loads(kept.read_text())
    assert found["summary"]["share_of_equal_texts"] == 1.0
    assert found["summary"]["difference"] == 0.0
    assert 0 < found["summary"]["accuracy_alone"] == found["summary"]["accuracy_together"]
    assert len(found["results"]) == 6
    # All is there: nothing is asked again.
    monkeypatch.setattr(parity, "answered_together", None)
    monkeypatch.setattr(parity, "answered_alone", None)
    assert parity.main() == parity.EXIT_CODES[parity.UNDECIDED]
    assert "share_of_equal_texts: 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_differing", "verdict"), [(0, "holds"), (8, "holds"), (1200, "fails"), (60, "undecided")]
)
def test_the_verdict_is_by_the_interval(parity, num_differing, verdict):
    # Eight adapters, 1,319 questions; so many answers that are right alone are wrong together.
    draw = np.random.default_rng(0)
    alone = draw.random((8, 1319)) < 0.5
    together = alone.copy()
    right = np.argwhere(alone)
    for at in draw.choice(len(right), num_differing, replace=False):
        together[tuple(right[at])] = False
    results = {
        f"{way}/{adapter}": {
            "texts": [str(one) for one in table[adapter]],
            "correct": table[adapter].tolist(),
            "seconds": 1.0,
        }
        for way, table in ((parity.TOGETHER, together), (parity.ALONE, alone))
        for adapter in range(8)
    }
    summary = parity.summary_of(results, [str(adapter) for adapter in range(8)])
    assert summary["verdict"] == verdict
    assert summary["difference"] == pytest.approx(-num_differing / (8 * 1319))

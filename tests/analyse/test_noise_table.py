"""Stored probes as a table of noise scales, through the API and the store."""

from pathlib import Path

import numpy as np
import pytest

from loratune import api
from loratune.analyse.noise_scale import GradientSums, noise_scale
from loratune.analyse.noise_table import noise_scale_table
from loratune.errors import AnalysisError
from loratune.records import BlockSums, NoiseProbe, Provenance
from loratune.report.noise_text import noise_scale_text
from loratune.store.database import open_store
from loratune.study.loading import load_study
from planned_studies import TEXT
from simulated import result

RESULT = result(1.0)
RUN = Provenance("reference", "cpu", (), None, "host", 1)


def probe(update: int, *, split: str = "train", scaled: bool = True) -> NoiseProbe:
    draw = np.random.default_rng(update)
    a, b = (float(16 + draw.normal()), float(2 + 0.1 * draw.normal())), (40.0 + update, 3.0)
    return NoiseProbe(
        trial_id=RESULT.trial.trial_id,
        update=update,
        split=split,  # pyright: ignore[reportArgumentType]
        num_rows=9,
        num_examples=8,
        num_targets=50,
        num_tokens=70,
        blocks=(
            BlockSums("A", *(a if update else (0.0, 0.0)), *(a if scaled else ())),
            BlockSums("B", *b, *(b if scaled else ())),
        ),
    )


PROBES = [probe(0, scaled=False), *map(probe, range(1, 12)), probe(0, split="validation")]


def row(table, **wanted):
    found = table
    for name, value in wanted.items():
        found = found[found[name] == value]
    (one,) = found.to_dict("records")
    return one


def test_blocks_add_up_and_probes_without_gradient_or_second_moment_are_left_out():
    table = noise_scale_table([RESULT], PROBES)
    of_a = row(table, split="train", coordinates="raw", block="A")
    assert of_a["num_probes"] == 11
    assert row(table, split="train", coordinates="raw", block="B")["num_probes"] == 12
    assert row(table, split="train", coordinates="adam", block="all")["num_probes"] == 11
    together = row(table, split="train", coordinates="raw", block="all")
    sums = [
        GradientSums(
            8,
            sum(one.sum_squares for one in probe.blocks),
            sum(one.mean_square for one in probe.blocks),
        )
        for probe in PROBES[:12]
    ]
    expected = noise_scale(sums)
    assert (together["noise_scale"], together["low"], together["high"], together["trace"]) == (
        expected.value,
        expected.low,
        expected.high,
        expected.trace,
    )
    assert expected.verdict == together["verdict"] == "estimate"
    held_out = row(table, split="validation", coordinates="raw", block="B")
    assert (held_out["verdict"], held_out["num_probes"]) == ("undetermined", 1)


def test_the_text_says_each_verdict_and_nothing_else_as_a_number():
    text = noise_scale_text(noise_scale_table([RESULT], PROBES))
    assert text.startswith(f"{RESULT.trial.trial_id}: lora, rank")
    assert "undetermined: one probe alone has no interval" in text
    assert "95%" in text


def test_without_probes_it_says_what_to_write():
    with pytest.raises(AnalysisError, match=r"noise_scale: \{every: 10\}"):
        noise_scale_table([RESULT], [])


def test_probes_come_back_from_the_store_exactly_and_the_last_look_counts(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(TEXT)
    name = load_study(tmp_path / "study.yaml").study.study
    with open_store(tmp_path / "loratune.db", create=True) as store:
        store.add_study(
            name, text=TEXT, select_on="validation_loss", trials=[RESULT.trial], asks=()
        )
        attempt = store.claim(RESULT.trial.trial_id, provenance=RUN)
        assert attempt is not None
        assert store.add_noise_probes(attempt, [probe(3, scaled=False)])
        assert store.add_noise_probes(attempt, PROBES)
        wanted = sorted(PROBES, key=lambda one: (one.split, one.update))
        assert list(store.noise_probes(name)) == wanted
        assert RESULT.outcome is not None
        assert store.finish(attempt, RESULT.outcome)
        # Who has lost the trial writes nothing.
        assert not store.add_noise_probes(attempt, [probe(99)])
        assert list(store.noise_probes(name)) == wanted
    table = api.noise_scale(tmp_path)
    assert table.equals(noise_scale_table([RESULT], wanted))

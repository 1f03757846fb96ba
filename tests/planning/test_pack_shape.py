"""The planned memory of a pack against what was measured, and how a pack is made to fit."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loratune.planning.pack_shape import (
    PROBED_TIMES,
    SHARE_OF_MEMORY,
    head_bytes,
    pack_bytes,
    plan_pack,
    unpacked_bytes,
)
from loratune.planning.packing import PackShape, logit_rows
from loratune.records import ModelFacts
from tiny_trials import random_data, tiny_trial

ROOT = Path(__file__).parents[2]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The engine that was measured left two workspaces of cuBLAS, 32 MiB each, behind for every pack
# that its process had trained before: each was warmed up on a stream of its own.
LEFT_BY_EARLIER_PACK = 2 * 32 * 2**20


def timed_shape(name: str) -> Any:
    """A shape of benchmarks/model_shapes.py; that folder is no package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return import_module("model_shapes").SHAPES[name]
    finally:
        sys.path.pop(0)


def facts_of(shape: str) -> ModelFacts:
    return timed_shape(shape).facts


def planned_then(shape: PackShape, model: ModelFacts) -> int:
    """Today's plan with the head of the engine that was measured: two chunks of logits at once."""
    planned = pack_bytes(shape, model=model, precision="bfloat16", targets=TARGETS)
    rows = min(2 * logit_rows(model.vocab_size), shape.tokens_per_step)
    of_head = 2 * rows * (model.vocab_size + model.hidden_size)
    return planned - head_bytes(shape, model=model, precision="bfloat16") + of_head


def shape_of(result: Any) -> PackShape:
    """Of a measured pack of benchmarks/throughput.py."""
    case = result["case"]
    return PackShape(
        num_slots=result["num_slots"],
        tokens_per_step=result["tokens_per_step"],
        rank=case["rank"],
        magnitudes=case["method"] == "dora",
    )


def recorded() -> list[Any]:
    """Every measured pack of today's engine, with the packs before it whose workspaces stayed."""
    tables = json.loads((ROOT / "docs" / "log" / "throughput-h100.json").read_text())
    cases = list[Any]()
    for table in ("first_table", "second_table", "third_table"):
        packs = [one for one in tables[table]["results"] if one["case"]["what"] == "packed"]
        before = 0
        for one in packs:
            # It was made smaller after it had run out of memory, which was a pack of its own.
            asked = timed_shape(one["case"]["shape"]).tokens_per_step
            before += one["tokens_per_step"] < asked
            name = "{shape}, {num_adapters} x {batch_size}, rank {rank}, {method}, {rows}"
            label = name.format(**one["case"])
            left = 0 if table == "third_table" else before
            # Before its kernels were fused, DoRA kept more than it does now.
            if one["case"]["method"] != "dora" or table == "third_table":
                cases.append(pytest.param(one, left, id=f"{table}: {label}"))
            before += 1
    assert len(cases) == 13
    # An engine later, on an H200: one workspace for all packs.
    later = json.loads((ROOT / "docs" / "log" / "throughput-h200.json").read_text())["results"]
    packs = [one for one in later if one["case"]["what"] == "packed"]
    assert len(packs) == 15
    for one in packs:
        label = "{shape}, {num_adapters} x {batch_size}".format(**one["case"])
        cases.append(pytest.param(one, 0, id=f"H200: {label}"))
    return cases


@pytest.mark.parametrize(("result", "before"), recorded())
def test_planned_memory_is_within_5_percent_of_every_recorded_pack(result: Any, before: int):
    # 5% is what is promised; the widest gap is 4.8%, and all are short rather than over.
    model = facts_of(result["case"]["shape"])
    expected = planned_then(shape_of(result), model) + before * LEFT_BY_EARLIER_PACK
    assert expected == pytest.approx(result["peak_memory_bytes"], rel=0.05)


def test_planned_memory_of_packs_with_one_buffer_of_logits_is_within_5_percent_but_for_dora():
    path = ROOT / "docs" / "log" / "throughput-launches-h200.json"
    results = [one for part in json.loads(path.read_text()).values() for one in part["results"]]
    packs = [one for one in results if one["case"]["what"] == "packed"]
    off = dict[str, list[float]]()
    for one in packs:
        case = one["case"]
        planned = pack_bytes(
            shape_of(one),
            model=facts_of(case["shape"]),
            precision=case["precision"],
            targets=TARGETS,
        )
        key = case["method"] if case["precision"] == "bfloat16" else case["precision"]
        off.setdefault(key, []).append(planned / one["peak_memory_bytes"])
    assert {key: len(ratios) for key, ratios in off.items()} == {"lora": 14, "nf4": 2, "dora": 1}
    assert all(0.95 <= ratio <= 1.05 for ratio in [*off["lora"], *off["nf4"]])
    # By a formula that was fitted before its head had one buffer.
    assert off["dora"] == [pytest.approx(1.055, abs=0.005)]


def planned_today(shape: PackShape, model: ModelFacts) -> int:
    return pack_bytes(shape, model=model, precision="bfloat16", targets=TARGETS)


def planned_over_taken(
    name: str, planned: Callable[[PackShape, ModelFacts], int], *, num_packs: int
) -> list[float]:
    """Of every recorded random pack, less what earlier packs had left on the device."""
    path = ROOT / "docs" / "log" / f"{name}.json"
    packs = list(json.loads(path.read_text())["results"].values())
    assert len(packs) == num_packs
    assert not any(one["num_out_of_memory"] or one["was_shrunk"] or one["error"] for one in packs)
    least = min(one["reserved_before_bytes"] for one in packs)
    return [
        planned(PackShape(**one["shape"]), facts_of("135m"))
        / (one["reserved_bytes"] - (one["reserved_before_bytes"] - least))
        for one in packs
    ]


@pytest.mark.xfail(strict=True, reason="reached by 15 of 17: docs/benchmarks.md")
def test_planned_memory_is_within_5_percent_of_every_recorded_random_pack():
    # Of a pack of 1 GiB the allocator's smallest segments are several percent.
    ratios = planned_over_taken("random-packs-one-buffer-h200", planned_today, num_packs=17)
    assert all(0.95 <= one <= 1.05 for one in ratios)


def test_planned_memory_of_random_packs_is_no_further_off_than_docs_benchmarks_says():
    # Not what is promised: what was found, so that a change for the worse shows.
    ratios = planned_over_taken("random-packs-one-buffer-h200", planned_today, num_packs=17)
    assert sum(0.95 <= one <= 1.05 for one in ratios) == 15
    assert 0.93 < min(ratios) < max(ratios) < 1.04
    # Rows of many lengths left holes in the allocator's segments, of two chunks of logits each.
    ratios = planned_over_taken("random-packs-h200", planned_then, num_packs=100)
    assert sum(0.95 <= one <= 1.05 for one in ratios) >= 84
    assert 0.85 < min(ratios) < max(ratios) < 1.08


def test_probed_packs_take_what_is_planned_or_somewhat_less():
    ratios = planned_over_taken("random-packs-probed-h200", planned_today, num_packs=9)
    assert 0.95 < min(ratios) < max(ratios) < 1.14
    assert sum(one <= 1.05 for one in ratios) >= 6


SMALL = PackShape(num_slots=8, tokens_per_step=4096, rank=16)


@pytest.mark.parametrize(
    "more",
    [
        {"num_slots": 9},
        {"tokens_per_step": 4160},
        {"rank": 24},
        {"corrected": True},
        {"magnitudes": True},
        {"dropout": True},
        {"probed": True},
    ],
)
def test_whatever_a_pack_has_more_of_takes_memory(more: dict[str, Any]):
    def needed(shape: PackShape) -> int:
        return planned_today(shape, facts_of("135m"))

    assert needed(replace(SMALL, **more)) > needed(SMALL)
    assert needed(replace(SMALL, gradient_checkpointing=True)) < needed(SMALL)


def test_a_probed_step_keeps_its_tokens_once_more():
    def needed(shape: PackShape) -> int:
        return planned_today(shape, facts_of("135m"))

    probed = replace(SMALL, probed=True)
    of_tokens = needed(replace(SMALL, tokens_per_step=8192)) - needed(SMALL)
    more = needed(probed) - needed(SMALL)
    assert more == pytest.approx((PROBED_TIMES - 1) * of_tokens, rel=0.02)
    data, model = random_data(40), facts_of("135m")
    trials = [replace(tiny_trial(data, batch_size=4), targets=TARGETS)]
    rows = replace(data.facts, max_row_tokens=512, num_tokens=40 * 256)
    plain, looked_at = (
        plan_pack(trials, model=model, data=[rows], memory_bytes=2 * 2**30, probed=probed)
        for probed in (False, True)
    )
    assert looked_at.probed
    assert needed(looked_at) <= SHARE_OF_MEMORY * 2 * 2**30
    assert looked_at.tokens_per_step <= plain.tokens_per_step


@pytest.mark.parametrize("gibibytes", [2, 3, 4, 8, 16, 80])
def test_a_planned_pack_fits_the_memory_it_was_planned_for(gibibytes: int):
    data, model = random_data(40), facts_of("135m")
    one = replace(tiny_trial(data, batch_size=4), targets=TARGETS)
    trials = [replace(one, trial_id=f"trial-{number}") for number in range(64)]
    long_rows = replace(data.facts, max_row_tokens=512, num_tokens=40 * 256)
    shape = plan_pack(trials, model=model, data=[long_rows], memory_bytes=gibibytes * 2**30)
    needed = pack_bytes(shape, model=model, precision=trials[0].precision, targets=TARGETS)
    assert needed <= SHARE_OF_MEMORY * gibibytes * 2**30
    assert shape.tokens_per_step >= 512


@pytest.mark.parametrize(("num_processes", "slots"), [(1, 12), (2, 6), (5, 3)])
def test_a_pack_has_slots_for_its_processs_part_of_the_trials(num_processes: int, slots: int):
    data, model = random_data(40), facts_of("135m")
    one = replace(tiny_trial(data, batch_size=4), targets=TARGETS)
    shape = plan_pack(
        [replace(one, trial_id=f"trial-{number}") for number in range(12)],
        model=model,
        data=[data.facts],
        memory_bytes=None,
        num_processes=num_processes,
    )
    assert shape.num_slots == slots


def test_a_quantised_base_needs_room_for_its_widest_unpacked_group():
    llama = facts_of("7b")
    shape = PackShape(num_slots=1, tokens_per_step=4096, rank=16)

    def needed(precision: str = "nf4", targets: tuple[str, ...] = TARGETS, **changes: Any) -> int:
        return unpacked_bytes(
            replace(shape, **changes), model=llama, precision=precision, targets=targets
        )

    assert needed("bfloat16") == 0
    assert needed() == 2 * 2 * 4096 * 11008
    # Each layer is alone beside a dropout, and where no adapter is on all that read one input.
    assert needed(dropout=True) == 2 * 4096 * 11008
    assert needed(targets=("gate_proj",)) == 2 * 4096 * 11008
    assert needed(targets=("q_proj", "k_proj", "v_proj")) == 2 * 3 * 4096 * 4096

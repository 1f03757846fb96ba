"""Costs against published and measured figures."""

import math
from dataclasses import replace

import pytest

from loratune.errors import AnalysisError
from loratune.planning.cost import (
    H100,
    Timing,
    flops_per_token,
    measured_rate,
    stated_rate,
    tokens_that_fit,
    trial_cost,
    weight_bytes,
)
from loratune.planning.shapes import declared_model_facts
from loratune.study.schema import DeclaredModel
from planned_studies import DATA, model, study, trials

LLAMA_7B = declared_model_facts(
    "7B",
    DeclaredModel(
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
    ),
)
QWEN_06B = declared_model_facts(
    "0.6B",
    DeclaredModel(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tied_embeddings=True,
    ),
)
SMOLLM_135M = declared_model_facts(
    "135M",
    DeclaredModel(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tied_embeddings=True,
    ),
)


def per_token(facts, **changes):
    settings = {"rank": 16, "mean_attended_tokens": 256.0, "target_share": 1.0, **changes}
    return flops_per_token(facts, targets=facts.linears, **settings)


def test_the_known_parameter_counts():
    assert LLAMA_7B.num_parameters == pytest.approx(6.738e9, rel=1e-3)
    assert SMOLLM_135M.num_parameters == pytest.approx(134.5e6, rel=1e-3)


def test_a_vendors_tokens_a_second_come_to_678_teraflops():
    # NVIDIA NeMo, Llama-2-7B LoRA on one H100: 25,206 tokens/s; the vendor reports 673 TFLOP/s.
    assert 25_206 * per_token(LLAMA_7B) / 1e12 == pytest.approx(678, rel=0.01)


def test_checkpointing_runs_the_blocks_once_more():
    more = per_token(LLAMA_7B, gradient_checkpointing=True) - per_token(LLAMA_7B)
    assert more == 2 * LLAMA_7B.num_block_parameters


def test_a_sliding_window_bounds_what_is_attended():
    sliding = replace(LLAMA_7B, sliding_window=64, num_sliding_layers=16)
    saved = per_token(LLAMA_7B) - per_token(sliding)
    assert saved == 7 * (256 - 64) * 4096 * 16


def test_only_target_tokens_go_through_the_head():
    half = per_token(LLAMA_7B) - per_token(LLAMA_7B, target_share=0.5)
    assert half == 4 * 0.5 * 32000 * 4096


# Rows of 256 tokens a second, eager PEFT 0.21, one H100, rank 16: (model, batch size, rows/s).
MEASURED = [
    (SMOLLM_135M, 1, 5.4),
    (SMOLLM_135M, 4, 16.2),
    (SMOLLM_135M, 16, 66),
    (SMOLLM_135M, 64, 244),
    (QWEN_06B, 1, 5.9),
    (QWEN_06B, 4, 20.2),
    (QWEN_06B, 16, 83),
    (LLAMA_7B, 1, 4.0),
    (LLAMA_7B, 4, 17.5),
    (LLAMA_7B, 16, 40.9),
]


@pytest.mark.parametrize(("facts", "batch_size", "rows_per_second"), MEASURED)
def test_the_stated_rate_is_within_a_third_of_every_measurement(facts, batch_size, rows_per_second):
    # The worst is 31% (7B at batch 4).
    seconds = H100.seconds(
        batch_size * 256 * per_token(facts),
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
    )
    assert math.exp(abs(math.log(batch_size / seconds / rows_per_second))) < 4 / 3


def test_a_stated_rate_is_flops_over_it():
    assert stated_rate(100).seconds(5e14, num_layers=3, hidden_size=7) == 5.0


def test_a_rate_is_found_again_from_its_own_timings():
    truth = replace(stated_rate(50), seconds_per_layer=0.01)
    timings = [
        Timing(24, flops, truth.seconds(flops, num_layers=24, hidden_size=1))
        for flops in (1e11, 1e12, 3e12, 5e13, 2e14)
    ]
    found = measured_rate(timings, device="here")
    assert found.seconds_per_layer == pytest.approx(0.01, rel=1e-3)
    assert found.max_flops_per_second == pytest.approx(50e12, rel=1e-3)
    assert "measured on 5 trials" in found.device
    with pytest.raises(AnalysisError, match="--tflops"):
        measured_rate([], device="here")


def cost(**changes):
    (trial,) = trials(study(**changes))
    return trial_cost(trial, model=model(), data=DATA, rate=H100, tokens_per_microbatch=100)


def test_tokens_and_flops_are_those_of_the_rows_seen():
    once, twice = cost(), cost(protocol="{kind: fixed_samples, epochs: 2}")
    assert once.num_tokens == 640
    assert twice.flops == 2 * once.flops


def test_a_batch_that_is_cut_takes_more_micro_batches_and_no_more_memory():
    small, large = cost(batch_size="[8]"), cost(batch_size="[64]")
    assert (small.num_microbatches, large.num_microbatches) == (1, 7)
    assert large.peak_memory_bytes == small.peak_memory_bytes
    assert cost(rank="8").peak_memory_bytes > small.peak_memory_bytes


def test_pissa_is_exported_at_twice_the_rank():
    assert cost(methods="[pissa]").adapter_bytes == 2 * cost().adapter_bytes


def test_a_micro_batch_is_at_least_the_longest_row():
    (trial,) = trials(study())
    fit = tokens_that_fit(0, model=model(), trial=trial, max_row_tokens=16, most=1000)
    assert fit == 16
    assert tokens_that_fit(10**12, model=model(), trial=trial, max_row_tokens=16, most=99) == 99


def test_a_quantised_base_keeps_its_embeddings_and_head_in_16_bits():
    # 6,476,005,376 weights in the blocks' linear layers, 2 * 32000 * 4096 outside of them.
    inside, outside = 6_476_005_376, 262_144_000
    assert weight_bytes(LLAMA_7B, "bfloat16") == 2 * (inside + outside)
    assert weight_bytes(LLAMA_7B, "float32") == 4 * (inside + outside)
    assert weight_bytes(LLAMA_7B, "int8") == inside + 2 * outside
    # Four bits each and a float32 scale for every 64.
    assert weight_bytes(LLAMA_7B, "nf4") == inside // 2 + inside // 64 * 4 + 2 * outside
    # QLoRA's 4.127 bits are with double quantisation; without it a scale costs half a bit.
    assert weight_bytes(LLAMA_7B, "nf4") / 2**30 == pytest.approx(3.88, abs=0.01)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_only_the_weights_of_a_quantised_base_need_less_than_those_of_a_16_bit_one(precision):
    whole, less = cost(), cost(precision=precision)
    saved = weight_bytes(model(), "bfloat16") - weight_bytes(model(), precision)
    assert saved > 0
    assert whole.peak_memory_bytes - less.peak_memory_bytes == saved
    assert (whole.flops, whole.adapter_bytes) == (less.flops, less.adapter_bytes)

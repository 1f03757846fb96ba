"""What a trial costs: FLOPs, hours, memory, disk. Estimates, each with its formula and its source.

FLOPs a token = 4 (N + f V h) + 7 S w L + 6 r sum(in + out): forward and the backward through the
frozen weights (2 + 2), attention, and the adapter's forward and two backward products. N are the
linear weights of the blocks, f the share of tokens with loss, V h the output head, S the mean
attended length (limited by a sliding window), w the attention width, L the layers.

Not covered: validation, generation, the start of a process, the SVD of PiSSA and MiLoRA, the time
in which a quantised layer's weights are unpacked for each product, and, for one adapter at a time,
the memory (`pack_shape` counts it for a pack).
"""

# scipy has no complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from loratune.errors import AnalysisError
from loratune.planning.targets import matched_linears
from loratune.records import DataFacts, LinearShape, ModelFacts, Trial
from loratune.study.methods import describe

# An activation, and a weight that is not quantised.
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "nf4": 2, "int8": 2}
# A quantised weight: four bits and its share of a float32 scale a block of 64 (bitsandbytes'
# default, without double quantisation); eight bits.
QUANTISED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
# Weight, gradient and AdamW's two moments, all float32.
BYTES_PER_TRAINED_PARAMETER = 16
# A second, frozen set of factors (the part that was taken out of the base), float32.
BYTES_PER_FROZEN_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast a device trains one adapter at a time, and where that figure is from.

    A micro-batch takes max(seconds_per_layer x layers, FLOPs / flops_per_second): small batches
    wait for kernel launches, large ones for arithmetic. The arithmetic rate grows with the hidden
    size up to `max_flops_per_second`, since narrow layers are bound by memory traffic.
    `memory_bytes` bounds a micro-batch where the device's memory is known.
    """

    device: str
    seconds_per_layer: float
    flops_per_second_per_width: float
    max_flops_per_second: float
    memory_bytes: int | None = None

    def seconds(self, flops: float, *, num_layers: int, hidden_size: int) -> float:
        """Seconds of one micro-batch of `flops`."""
        rate = min(self.max_flops_per_second, self.flops_per_second_per_width * hidden_size)
        return max(self.seconds_per_layer * num_layers, flops / rate)


# Fitted by hand to eager PEFT 0.21 on one H100, rank 16, rows of 256 tokens, in rows a second:
# 135M: 5.4, 16.2, 66, 244 at batch 1, 4, 16, 64; 0.6B: 5.9, 20.2, 83 at 1, 4, 16;
# 7B: 4.0, 17.5, 40.9 at 1, 4, 16. The launch floor is 6 to 8 ms a layer, the arithmetic rate
# 38 TFLOP/s at width 576 and 283 at width 4096.
H100 = Rate(
    device="one NVIDIA H100, one adapter at a time (stated rate, not measured here)",
    seconds_per_layer=0.0072,
    flops_per_second_per_width=6.9e10,
    max_flops_per_second=283e12,
    memory_bytes=80 * 2**30,
)


def stated_rate(tflops: float) -> Rate:
    """A constant rate of the user's own, in TFLOP/s, without a launch floor."""
    return Rate(
        device=f"a device that sustains {tflops:g} TFLOP/s (stated rate)",
        seconds_per_layer=0.0,
        flops_per_second_per_width=math.inf,
        max_flops_per_second=tflops * 1e12,
    )


@dataclass(frozen=True, slots=True)
class Timing:
    """A trial that was timed: FLOPs and seconds of its mean micro-batch, layers of its model."""

    num_layers: int
    flops: float
    seconds: float


def measured_rate(timings: Sequence[Timing], *, device: str) -> Rate:
    """The rate that fits timed trials best: least squares in log seconds, floor and rate free.

    Raises:
        AnalysisError: no timed trial.
    """
    if not timings:
        raise AnalysisError("no finished trial of these models to take a rate from; state --tflops")
    layers = np.array([one.num_layers for one in timings], dtype=float)
    flops = np.array([one.flops for one in timings])
    seconds = np.array([one.seconds for one in timings])

    def error(log_parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        floor, rate = np.exp(log_parameters)
        return np.log(np.maximum(floor * layers, flops / rate) / seconds)

    # Both bounds are reached by some trial: the fastest micro-batch, the best arithmetic.
    start = np.log([np.min(seconds / layers), np.max(flops / seconds)])
    floor, rate = np.exp(least_squares(error, start).x)
    return Rate(
        device=f"{device} (measured on {len(timings)} trials)",
        seconds_per_layer=float(floor),
        flops_per_second_per_width=math.inf,
        max_flops_per_second=float(rate),
    )


def flops_per_token(
    model: ModelFacts,
    *,
    rank: int,
    targets: Sequence[LinearShape],
    mean_attended_tokens: float,
    target_share: float,
    gradient_checkpointing: bool = False,
) -> float:
    """Training FLOPs of one token of one adapter by the formula above.

    `mean_attended_tokens` is S = sum T_i^2 / sum T_i, `target_share` is f. Full checkpointing runs
    the blocks' forward once more: 2 N.
    """
    head = target_share * model.vocab_size * model.hidden_size
    matrices = 4 * (model.num_block_parameters + head)
    if gradient_checkpointing:
        matrices += 2 * model.num_block_parameters
    window = min(mean_attended_tokens, model.sliding_window or math.inf)
    attended = (
        mean_attended_tokens * (model.num_layers - model.num_sliding_layers)
        + window * model.num_sliding_layers
    )
    attention = 7 * attended * model.attention_width
    sides = sum((one.in_features + one.out_features) * one.count for one in targets)
    return matrices + attention + 6 * rank * sides


@dataclass(frozen=True, slots=True)
class TrialCost:
    """What one trial trains on and needs; a full batch is cut into `num_microbatches`."""

    num_tokens: float
    flops: float
    num_microbatches: int
    seconds: float
    peak_memory_bytes: int
    adapter_bytes: int


def trial_cost(
    trial: Trial,
    *,
    model: ModelFacts,
    data: DataFacts,
    rate: Rate,
    tokens_per_microbatch: int,
) -> TrialCost:
    """The cost of one trial; rows are taken at their mean length.

    `tokens_per_microbatch` is the most that goes through the model at once, and less where the
    rate's device has less memory: a batch of more is cut, which costs launches but no accuracy.
    """
    linears = matched_linears(model, trial.targets)
    weights = weight_bytes(model, trial.precision)
    if rate.memory_bytes is not None:
        tokens_per_microbatch = tokens_that_fit(
            rate.memory_bytes - weights,
            model=model,
            trial=trial,
            max_row_tokens=data.max_row_tokens,
            most=tokens_per_microbatch,
        )
    mean_tokens = data.num_tokens / data.num_train_rows
    # AdaLoRA trains at its initial rank until its budget is pruned.
    ratio = dict(trial.method.options).get("initial_rank_ratio")
    rank = trial.rank if ratio is None else math.ceil(float(ratio) * trial.rank)
    per_token = flops_per_token(
        model,
        rank=rank,
        targets=linears,
        mean_attended_tokens=data.sum_squared_tokens / data.num_tokens,
        target_share=data.num_target_tokens / data.num_tokens,
    )
    num_tokens = trial.num_samples * mean_tokens
    flops = num_tokens * per_token
    microbatches = max(1, math.ceil(trial.batch_size * mean_tokens / tokens_per_microbatch))
    seconds = microbatches * rate.seconds(
        trial.batch_size * mean_tokens * per_token / microbatches,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
    )
    factors = rank * sum((one.in_features + one.out_features) * one.count for one in linears)
    frozen = factors if describe(trial.method.name).takes_from_base else 0
    resident = min(trial.batch_size * data.max_row_tokens, tokens_per_microbatch)
    return TrialCost(
        num_tokens=num_tokens,
        flops=flops,
        num_microbatches=microbatches,
        seconds=trial.num_updates * seconds,
        peak_memory_bytes=(
            weights
            + factors * BYTES_PER_TRAINED_PARAMETER
            + frozen * BYTES_PER_FROZEN_FACTOR
            + max(resident, data.max_row_tokens)
            * activation_bytes_per_token(model, trial.precision, linears, rank=rank)
        ),
        # What is exported: pissa, milora and olora as adapters of twice the rank.
        adapter_bytes=(factors + frozen) * 4,
    )


def weight_bytes(model: ModelFacts, precision: str) -> int:
    """Bytes of the frozen base; what is quantised are the linear layers of its blocks."""
    element = BYTES[precision]
    others = model.num_parameters - model.num_block_parameters
    in_blocks = QUANTISED_BYTES.get(precision, element)
    return math.ceil(model.num_block_parameters * in_blocks) + others * element


def activation_bytes_per_token(
    model: ModelFacts, precision: str, targets: Sequence[LinearShape], *, rank: int
) -> int:
    """Bytes kept for the backward pass, a token: an estimate without checkpointing.

    A block keeps the inputs of its norms (float32), of its matrices, of attention and of the gated
    product; each adapter keeps its layer's input and A x in float32; the head keeps logits in the
    base's precision, in float32, and their gradient. Blocks that fuse or recompute keep less.
    """
    element = BYTES[precision]
    per_block = element * (4 * model.hidden_size + 4 * model.attention_width)
    per_block += element * 4 * model.intermediate_size + 4 * 4 * model.hidden_size
    adapters = sum(4 * (one.in_features + rank) * one.count for one in targets)
    head = model.vocab_size * (element + 4 + 4)
    return model.num_layers * per_block + adapters + head


def tokens_that_fit(
    free_bytes: int, *, model: ModelFacts, trial: Trial, max_row_tokens: int, most: int
) -> int:
    """Tokens of one micro-batch that should fit into `free_bytes`; at least one longest row.

    Half of the estimate is left as a reserve: it is one. An out-of-memory error halves the result
    once more, so a wrong estimate costs time and no trial.
    """
    linears = matched_linears(model, trial.targets)
    a_token = activation_bytes_per_token(model, trial.precision, linears, rank=trial.rank)
    return max(max_row_tokens, min(most, free_bytes // (2 * a_token)))

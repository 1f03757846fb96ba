"""How large a pack a device holds: slots, tokens a step, and the memory that both take. Pure.

Memory is what the packed engine allocates, term by term: the base; a row of parameters, gradient,
moments and factors for each slot; what the blocks keep of each token for the backward pass; what
one block's backward and the head need beside it. Fixed terms are of the CUDA libraries.
"""

import math
from collections.abc import Sequence

from loratune.planning.cost import BYTES, weight_bytes
from loratune.planning.packing import PackShape
from loratune.planning.targets import matched_linears
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.methods import describe

# Steps of so many tokens keep an H100 busy: the narrower the model, the more tokens.
TOKENS_BY_WIDTH = ((1024, 32_768), (2048, 16_384), (math.inf, 8_192))
# On a CPU larger steps gain nothing, and lose cache.
TOKENS_ON_CPU = 4096
MOST_SLOTS = 256
# What is left free, for allocations that come in other sizes than planned.
SHARE_OF_MEMORY = 0.92
# Workspaces of cuBLAS, the context, the logits of the head.
FIXED_BYTES = 2**30


def plan_pack(
    trials: Sequence[Trial],
    *,
    model: ModelFacts,
    data: Sequence[DataFacts],
    memory_bytes: int | None,
    gradient_checkpointing: bool = False,
) -> PackShape:
    """The shape of a pack for trials of one model and one set of targets.

    Slots enough that the trials of the smallest batches fill a step, as far as memory goes; a step
    no larger than what the slots can give at once.

    Args:
        trials: all that the pack will see, in any order.
        model: the base.
        data: of every row set that the trials train on.
        memory_bytes: the device's whole memory; None: a CPU, whose memory is not counted.
        gradient_checkpointing: blocks keep their input alone. Also chosen where without it only a
            quarter of the tokens would fit.
    """
    longest = max(facts.max_row_tokens for facts in data)
    mean = sum(facts.num_tokens for facts in data) / sum(facts.num_train_rows for facts in data)
    choices = [describe(trial.method.name) for trial in trials]
    smallest = min(trial.batch_size for trial in trials)
    wanted = (
        TOKENS_ON_CPU
        if memory_bytes is None
        else next(tokens for width, tokens in TOKENS_BY_WIDTH if model.hidden_size <= width)
    )
    tokens = max(longest, wanted)
    # One more than enough: a slot whose trial has just ended gives nothing to the next step.
    slots = min(len(trials), MOST_SLOTS, 1 + math.ceil(tokens / (smallest * mean)))

    def shape(num_slots: int, tokens_per_step: int, *, checkpointing: bool) -> PackShape:
        return PackShape(
            num_slots=num_slots,
            tokens_per_step=tokens_per_step,
            rank=max(trial.rank for trial in trials),
            corrected=any(choice.takes_from_base for choice in choices),
            magnitudes=any(choice.has_magnitudes for choice in choices),
            dropout=any(trial.dropout > 0 for trial in trials),
            gradient_checkpointing=checkpointing,
        )

    # The largest batches of so many trials: what the slots can give at once.
    batches = sorted((trial.batch_size for trial in trials), reverse=True)[:slots]
    tokens = max(longest, min(tokens, math.ceil(sum(batches) * mean)))
    checkpointing = gradient_checkpointing
    if memory_bytes is None:
        return shape(slots, tokens, checkpointing=checkpointing)
    precision, targets = trials[0].precision, trials[0].targets
    while True:
        planned = shape(slots, tokens, checkpointing=checkpointing)
        needed = pack_bytes(planned, model=model, precision=precision, targets=targets)
        if needed <= SHARE_OF_MEMORY * memory_bytes:
            return planned
        # Fewer tokens, down to a quarter; then blocks that keep less; then fewer slots, which cost
        # small batches their speed.
        if tokens > max(longest, wanted // 4):
            tokens = max(longest, tokens // 2)
        elif not checkpointing:
            checkpointing = True
        elif slots > 1:
            slots = slots * 3 // 4
        elif tokens > longest:
            tokens = max(longest, tokens // 2)
        else:
            return planned  # The engine will find out: its trials end as out of memory.


def pack_bytes(
    shape: PackShape, *, model: ModelFacts, precision: str, targets: Sequence[str]
) -> int:
    """Peak memory of a pack on a CUDA device."""
    return round(
        weight_bytes(model, precision)
        + FIXED_BYTES
        + shape.num_slots * slot_bytes(shape, model=model, precision=precision, targets=targets)
        + shape.tokens_per_step
        * token_bytes(
            model,
            precision,
            gradient_checkpointing=shape.gradient_checkpointing,
            magnitudes=shape.magnitudes,
        )
    )


def slot_bytes(
    shape: PackShape, *, model: ModelFacts, precision: str, targets: Sequence[str]
) -> int:
    """A slot's rows: parameters, gradient and two moments in float32; factors; frozen factors."""
    linears = matched_linears(model, targets)
    factors = shape.rank * sum((one.in_features + one.out_features) * one.count for one in linears)
    outputs = sum(one.out_features * one.count for one in linears) if shape.magnitudes else 0
    element = BYTES[precision]
    halves = 2 if shape.corrected else 1
    frozen = 4 * factors if shape.corrected else 0
    # Beside m itself: m / norm and 1 / norm.
    return 16 * (factors + outputs) + element * halves * factors + frozen + 8 * outputs


def token_bytes(
    model: ModelFacts,
    precision: str,
    *,
    gradient_checkpointing: bool = False,
    magnitudes: bool = False,
) -> float:
    """What a token takes: kept by every block, and by the backward of one block and the head.

    A block keeps the inputs of its two norms and their outputs, queries, keys and values before and
    after their rotation, the attention's output, and gate, up and their product. Checkpointed, it
    keeps its input, and one block at a time keeps all of it. With `magnitudes` (DoRA) every linear
    layer also keeps its output before it is rescaled.
    """
    hidden, ffn, width = model.hidden_size, model.intermediate_size, model.attention_width
    outputs = sum(one.out_features * one.count for one in model.linears) / model.num_layers
    qkv = max(width, outputs - 2 * hidden - 2 * ffn)
    rotated = width + (qkv - width) / 2
    kept = 4 * hidden + qkv + rotated + width + 3 * ffn + (outputs if magnitudes else 0)
    backward = qkv + 3 * hidden + 3 * ffn
    ends = 4 * hidden
    of_blocks = model.num_layers * kept
    if gradient_checkpointing:
        of_blocks = model.num_layers * hidden + kept
    return BYTES[precision] * (of_blocks + backward + ends)

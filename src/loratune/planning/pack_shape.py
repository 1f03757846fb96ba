"""How large a pack a device holds: slots, tokens a step, and the memory that both take. Pure.

Memory is what the packed engine takes from the device, term by term: the base; a row of parameters,
gradient, moments and factors for each slot; what the blocks keep of each token for the backward
pass; what the last norm, one block's backward and the head need beside it; the gradients' partial
sums; cuBLAS' workspaces; over a quantised base one group's unpacked weight. What blocks keep was
read off the graphs that torch's partitioner makes of the compiled blocks (Llama and Qwen3, torch
2.13). Left out, because it is less than a percent: norms' and attention's sums a token, and holes
that sizes leave in the allocator's segments.
"""

import math
from collections.abc import Sequence

from loratune.planning.cost import BYTES, QUANTISED_BYTES, weight_bytes
from loratune.planning.packing import TOKENS_SUMMED_AT_ONCE, PackShape, logit_rows
from loratune.planning.targets import SIBLINGS, matched_linears
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.methods import describe

# Steps of so many tokens keep an H100 busy: the narrower the model, the more tokens.
TOKENS_BY_WIDTH = ((1024, 32_768), (2048, 16_384), (math.inf, 8_192))
# On a CPU larger steps gain nothing, and lose cache.
TOKENS_ON_CPU = 4096
MOST_SLOTS = 256
# What is left free, for allocations that come in other sizes than planned.
SHARE_OF_MEMORY = 0.92
# torch gives cuBLAS 32 MiB on Hopper, and less on older cards, for each pair of thread and stream:
# the head on the main stream, forward and backward (a thread of autograd's) on the side stream.
WORKSPACE_BYTES = 3 * 32 * 2**20
# A probed step runs eagerly, and its activations come on top of those that captured steps keep for
# good. Eagerly blocks keep more than compiled (2.04 to 2.50 times in all, where nothing is
# checkpointed: nine packs of 135m on an H200).
PROBED_TIMES = 2.4


def plan_pack(
    trials: Sequence[Trial],
    *,
    model: ModelFacts,
    data: Sequence[DataFacts],
    memory_bytes: int | None,
    num_processes: int = 1,
    gradient_checkpointing: bool = False,
    probed: bool = False,
) -> PackShape:
    """The shape of a pack for trials of one model and one set of targets.

    Slots enough that the trials of the smallest batches fill a step, as far as memory goes; a step
    no larger than what the slots can give at once.

    Args:
        trials: all that the pack will see, in any order.
        model: the base.
        data: of every row set that the trials train on.
        memory_bytes: the device's whole memory; None: a CPU, whose memory is not counted.
        num_processes: how many share the trials, with a pack each: no pack has slots for more than
            its part of them.
        gradient_checkpointing: blocks keep their input alone. Also chosen where without it only a
            quarter of the tokens would fit.
        probed: the noise scale is measured.
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
    share = math.ceil(len(trials) / num_processes)
    slots = min(share, MOST_SLOTS, 1 + math.ceil(tokens / (smallest * mean)))

    def shape(num_slots: int, tokens_per_step: int, *, checkpointing: bool) -> PackShape:
        return PackShape(
            num_slots=num_slots,
            tokens_per_step=tokens_per_step,
            rank=max(trial.rank for trial in trials),
            corrected=any(choice.takes_from_base for choice in choices),
            magnitudes=any(choice.has_magnitudes for choice in choices),
            dropout=any(trial.dropout > 0 for trial in trials),
            gradient_checkpointing=checkpointing,
            probed=probed,
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
    """Peak memory of a pack on a CUDA device, as far as PyTorch takes it (the context is not)."""
    times = PROBED_TIMES if shape.probed else 1
    return round(
        weight_bytes(model, precision)
        + WORKSPACE_BYTES
        + shape.num_slots * slot_bytes(shape, model=model, precision=precision, targets=targets)
        + times
        * shape.tokens_per_step
        * token_bytes(shape, model=model, precision=precision, targets=targets)
        + head_bytes(shape, model=model, precision=precision)
        + sums_bytes(shape, model=model, targets=targets)
        + unpacked_bytes(shape, model=model, precision=precision, targets=targets)
    )


def slot_bytes(
    shape: PackShape, *, model: ModelFacts, precision: str, targets: Sequence[str]
) -> int:
    """A slot's rows: parameters, gradient and two moments in float32; factors; frozen factors."""
    linears = matched_linears(model, targets)
    factors = shape.rank * sum((one.in_features + one.out_features) * one.count for one in linears)
    element = BYTES[precision]
    halves = 2 if shape.corrected else 1
    frozen = 4 * factors if shape.corrected else 0
    whole = 16 * factors + element * halves * factors + frozen
    if shape.magnitudes:
        outputs = sum(one.out_features * one.count for one in linears)
        # m, its gradient and moments; m / norm and 1 / norm.
        whole += (16 + 8) * outputs
    return whole


def token_bytes(
    shape: PackShape, *, model: ModelFacts, precision: str, targets: Sequence[str]
) -> float:
    """What a token takes: kept by every block, and by the last norm and one block's backward.

    A block keeps the inputs of its two norms and their outputs, queries, keys and values before and
    after their rotation, the attention's output, and gate, up and their product; and A x of every
    adapted layer, twice where a correction is taken. With `magnitudes` (DoRA) it also keeps what
    else nothing reads again: the outputs of o_proj and down_proj, and the joined queries, keys and
    values; beside a dropout, what was rescaled of every layer, because no output tells it. With
    `dropout` every adapted layer keeps what is left of its input, and which features are (there
    queries and keys before their rotation are not kept in most families: counted nevertheless).
    Checkpointed, a block keeps its input, and one block at a time keeps all of it.
    """
    linears = matched_linears(model, targets)
    num_layers, element = model.num_layers, BYTES[precision]
    hidden, ffn, width = model.hidden_size, model.intermediate_size, model.attention_width
    outputs = sum(one.out_features * one.count for one in model.linears) / num_layers
    qkv = max(width, outputs - 2 * hidden - 2 * ffn)
    rotated = width + (qkv - width) / 2
    directions = shape.rank * sum(one.count for one in linears) / num_layers
    kept = element * (4 * hidden + qkv + rotated + width + 3 * ffn)
    kept += element * directions * (2 if shape.corrected else 1)
    if shape.magnitudes:
        kept += element * (outputs if shape.dropout else qkv + 2 * hidden)
    if shape.dropout:
        kept += (element + 1) * sum(one.in_features * one.count for one in linears) / num_layers
    of_blocks = num_layers * kept
    if shape.gradient_checkpointing:
        of_blocks = num_layers * element * hidden + kept
    # Into the last block's backward: the gradient of its output, and those of gate and up (the
    # gated product's own gradient takes the place of the product).
    backward = element * (hidden + 2 * ffn)
    if shape.magnitudes:
        # The widest group's gradient before the gain.
        backward += element * 2 * ffn
    # Embedded tokens, the last block's output, hidden states, their gradient twice. The last norm
    # is not compiled: its input in float32, and five more such while it goes backward.
    ends = element * 5 * hidden + 4 * 6 * hidden
    return of_blocks + backward + ends


def head_bytes(shape: PackShape, *, model: ModelFacts, precision: str) -> int:
    """Logits of one chunk of target tokens, their hidden states and the gradient of these."""
    rows = min(logit_rows(model.vocab_size), shape.tokens_per_step)
    return BYTES[precision] * rows * (model.vocab_size + 2 * model.hidden_size)


def sums_bytes(shape: PackShape, *, model: ModelFacts, targets: Sequence[str]) -> int:
    """float32 sums of each chunk of tokens that wait to be added up: one buffer for all layers."""
    linears = matched_linears(model, targets)
    # Query, key and value go over one input side by side.
    sides = [max(one.in_features, one.out_features) for one in linears]
    widest = shape.rank * max(3 * model.hidden_size, *sides)
    chunks = shape.tokens_per_step // TOKENS_SUMMED_AT_ONCE + shape.num_slots
    return 4 * chunks * widest


def unpacked_bytes(
    shape: PackShape, *, model: ModelFacts, precision: str, targets: Sequence[str]
) -> int:
    """The widest unpacked weight of a quantised base: of layers that read one input, all of them.

    Layers without an adapter are unpacked one by one. Beside a dropout every layer is alone.
    """
    if precision not in QUANTISED_BYTES:
        return 0
    sizes = {one.name: one.in_features * one.out_features for one in model.linears}
    adapted = {one.name for one in matched_linears(model, targets)}
    families = [] if shape.dropout else [one for one in SIBLINGS if adapted.issuperset(one)]
    together = [sum(sizes[name] for name in family) for family in families]
    return BYTES[precision] * max([*sizes.values(), *together])

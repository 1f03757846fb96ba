"""What one GPU could reach at most: fewest FLOPs and bytes of a packed LoRA step, by hand.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --tflops 679 --terabytes 4.3

A bound, not a forecast. Kernels run one after the other; each takes its FLOPs or its bytes,
whichever is longer, at the rates measured for a plain product and a plain copy. Products read
their inputs and write their outputs once. Elementwise work is fused as far as one pass over memory
allows; a packed linear's adapters need passes of their own. No launch, no padding, no host.

Legend, per layer: h hidden, w queries (heads x head_dim), k keys, m inner width, r rank.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from model_shapes import SHAPES, Shape

ROW_TOKENS = 256
TARGET_SHARE = 1.0  # f: every token carries loss
ELEMENT = 2  # bytes of a bfloat16

# An update reads weight, gradient and two moments and writes weight, two moments (float32) and the
# bfloat16 copy that the products read: 16 + 12 + 2. The backward writes the gradient (4); forward
# and backward read the copy (2 + 2). No gradient is zeroed: its first sum overwrites.
BYTES_PER_PARAMETER_AND_UPDATE = 16 + 12 + 2 + 4 + 2 + 2


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a card can do in a second, measured: a large bfloat16 product, a copy within it."""

    flops: float
    bytes: float


H100 = Ceilings(flops=780e12, bytes=3.0e12)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One pass: its kind, FLOPs and bytes of one token of one layer."""

    kind: str
    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of the two."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share an input: `inputs` wide, `outputs` wide together."""

    inputs: int
    outputs: int
    members: int


def groups(shape: Shape) -> tuple[Group, ...]:
    """q, k, v; o; gate, up; down."""
    h, m = shape.hidden_size, shape.intermediate_size
    w, k = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return Group(h, w + 2 * k, 3), Group(w, h, 1), Group(h, 2 * m, 2), Group(m, h, 1)


def layer_kernels(shape: Shape, *, rank: int, tokens_per_step: int) -> Iterator[Kernel]:
    """Forward and backward of one block, for one token."""
    h, m = shape.hidden_size, shape.intermediate_size
    w, k = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    for group in groups(shape):
        inputs, outputs, low = group.inputs, group.outputs, group.members * rank
        flops = 2 * inputs * outputs
        # The weights are read once a step by each of the two products.
        moved = ELEMENT * (inputs + outputs + inputs * outputs / tokens_per_step)
        yield Kernel("products", flops, moved)  # y = x W'
        yield Kernel("products", flops, moved)  # dx = dy W
        # Each pass also writes or reads the H of this group. 2 FLOPs an element and a rank.
        down, up = 2 * rank * inputs * group.members, 2 * rank * outputs
        yield Kernel("adapters", down, ELEMENT * (inputs + low))  # H = x A'
        yield Kernel("adapters", up, ELEMENT * (2 * outputs + low))  # y += H B'
        yield Kernel("adapters", up, ELEMENT * (outputs + low))  # dH = dy B
        yield Kernel("adapters", up, ELEMENT * (outputs + low))  # dB = dy' H
        yield Kernel("adapters", down, ELEMENT * (inputs + low))  # dA = dH' x
        yield Kernel("adapters", down, ELEMENT * (2 * inputs + low))  # dx += dH A
    # Causal, flash: 2 S w forward, 5 S w backward, scores never in memory.
    attended = ROW_TOKENS * w
    yield Kernel("attention", 2 * attended, ELEMENT * (w + 2 * k + w))
    yield Kernel("attention", 5 * attended, ELEMENT * (2 * (w + 2 * k) + 2 * w))
    # Twice a layer: residual and branch in, sum and norm out; backward: three in, one out.
    for _ in range(2):
        yield Kernel("elementwise", 0, ELEMENT * 4 * h)
        yield Kernel("elementwise", 0, ELEMENT * 4 * h)
    # Rotary positions of queries and keys (and their norms, where there are some), in place.
    yield Kernel("elementwise", 0, ELEMENT * 2 * (w + k))
    yield Kernel("elementwise", 0, ELEMENT * 2 * (w + k))
    # silu(gate) up: two in, one out; backward: three in, two out.
    yield Kernel("elementwise", 0, ELEMENT * 3 * m)
    yield Kernel("elementwise", 0, ELEMENT * 5 * m)


def head_kernels(shape: Shape, *, tokens_per_step: int) -> Iterator[Kernel]:
    """Logits, their loss and its gradient in place, the gradient of the hidden state; a token."""
    h, v, f = shape.hidden_size, shape.vocab_size, TARGET_SHARE
    moved = ELEMENT * (f * (h + v) + h * v / tokens_per_step)
    yield Kernel("head", f * 2 * h * v, moved)
    yield Kernel("head", 0, ELEMENT * f * 2 * v)
    yield Kernel("head", f * 2 * h * v, moved)


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds a token by kind, and the FLOPs of the cost formula."""

    flops: float
    seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """At most."""
        return 1 / sum(self.seconds.values())


def bound(shape: Shape, *, rank: int, batch_size: int, ceilings: Ceilings = H100) -> Bound:
    """The bound of a step that holds `shape.tokens_per_step` tokens."""
    tokens = shape.tokens_per_step
    kernels = [
        kernel
        for kernel in layer_kernels(shape, rank=rank, tokens_per_step=tokens)
        for _ in range(shape.num_layers)
    ]
    kernels += head_kernels(shape, tokens_per_step=tokens)
    seconds = dict[str, float]()
    for kernel in kernels:
        seconds[kernel.kind] = seconds.get(kernel.kind, 0.0) + kernel.seconds(ceilings)
    sides = sum(one.members * one.inputs + one.outputs for one in groups(shape))
    moved = BYTES_PER_PARAMETER_AND_UPDATE * rank * sides * shape.num_layers
    seconds["optimizer"] = moved / (batch_size * ROW_TOKENS) / ceilings.bytes
    return Bound(sum(kernel.flops for kernel in kernels), seconds)


KINDS = ("products", "attention", "head", "adapters", "elementwise", "optimizer")


def table(*, rank: int, ceilings: Ceilings = H100) -> str:
    """Microseconds a token by kind, and what they allow, as a Markdown table."""
    columns = ("shape", "batch size", "GFLOP a token", *KINDS, "sum", "rows/s", "TFLOP/s")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name in ("135m", "0.6b", "1b", "7b"):
        for batch_size in (1, 16):
            one = bound(SHAPES[name], rank=rank, batch_size=batch_size, ceilings=ceilings)
            times = [1e6 * one.seconds[kind] for kind in KINDS]
            cells = [name, str(batch_size), f"{one.flops / 1e9:.2f}"]
            cells += [f"{time:.2f}" for time in [*times, sum(times)]]
            cells += [f"{one.tokens_per_second / ROW_TOKENS:.0f}"]
            cells += [f"{one.tokens_per_second * one.flops / 1e12:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tflops", type=float, default=H100.flops / 1e12, help="of a plain product"
    )
    parser.add_argument(
        "--terabytes", type=float, default=H100.bytes / 1e12, help="a second of a plain copy"
    )
    given = parser.parse_args()
    print(table(rank=16, ceilings=Ceilings(1e12 * given.tflops, 1e12 * given.terabytes)))

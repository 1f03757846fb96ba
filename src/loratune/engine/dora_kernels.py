"""DoRA's factors of all layers and slots in one launch: `methods.dora.row_norms` on CUDA.

Layer by layer they are thousands of small kernels an update, longer on the host than on the device.
Here a program works out 64 rows of one layer for one slot: with w a row of W and b the same of B,

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w') + s^2 b (A A') b'.

Products of float32 numbers by three products of TF32 each, which keeps float32's precision. The
slots of one block of W run one after another, so that it comes from memory once.

Legend: A slots, P numbers of a slot, D in, E out, R rank.
"""

# triton has no types, and is there with CUDA builds of torch alone.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.engine.memory import sent
from loratune.engine.slots import Slots

# A x A' of a rank above it does not fit a program's registers.
MOST_RANK = 128
ROWS = 64


@triton.jit
def _gains(
    jobs_ptr,
    weight_ptr,
    params_ptr,
    slots_ptr,
    scale_ptr,
    gain_ptr,
    inverse_ptr,
    rank,
    stride_params,
    stride_gain,
    NUM_FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    job = jobs_ptr + tl.program_id(1) * NUM_FIELDS
    # weight_ptr tells the type alone.
    weight = tl.load(job).to(tl.pointer_type(weight_ptr.dtype.element_ty))
    square_norms = tl.load(job + 1).to(tl.pointer_type(tl.float32))
    D, stride_w = tl.load(job + 2), tl.load(job + 3)
    begin, E = tl.load(job + 4), tl.load(job + 5)
    at_a, at_b, stride_b = tl.load(job + 6), tl.load(job + 7), tl.load(job + 8)
    at_m, at_gain = tl.load(job + 9), tl.load(job + 10)
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        D, stride_w = tl.multiple_of(D, 16), tl.multiple_of(stride_w, 16)
        at_a = tl.multiple_of(at_a, 16)
    params = params_ptr + slot * stride_params
    es = begin + tl.arange(0, BE)
    is_e = es < E
    rs = tl.arange(0, BR)
    is_r = rs < rank
    wa = tl.zeros((BE, BR), dtype=tl.float32)
    gram = tl.zeros((BR, BR), dtype=tl.float32)
    for d in range(0, D, BD):
        ds = d + tl.arange(0, BD)
        is_d = ds < D
        at_w = es[:, None] * stride_w + ds[None, :]
        w = tl.load(weight + at_w, mask=is_e[:, None] & is_d[None, :], other=0.0)
        at = at_a + rs[:, None] * D + ds[None, :]
        a = tl.load(params + at, mask=is_r[:, None] & is_d[None, :], other=0.0)
        wa = tl.dot(w.to(tl.float32), tl.trans(a), wa, input_precision=PRECISION)
        gram = tl.dot(a, tl.trans(a), gram, input_precision=PRECISION)
    at = at_b + rs[:, None] * stride_b + es[None, :]
    b = tl.load(params + at, mask=is_r[:, None] & is_e[None, :], other=0.0)
    cross = tl.sum(b * tl.trans(wa), axis=0)
    square = tl.sum(b * tl.dot(gram, b, input_precision=PRECISION), axis=0)
    scale = tl.load(scale_ptr + slot)
    norm2 = tl.load(square_norms + es, mask=is_e, other=1.0)
    norm2 = norm2 + 2 * scale * cross + scale * scale * square
    # Rounding alone makes it negative. NaN stays NaN.
    norm = tl.sqrt(tl.where(norm2 < 0, 0.0, norm2))
    inverse = 1 / norm
    m = tl.load(params + at_m + es, mask=is_e, other=0.0)
    at = slot * stride_gain + at_gain + es
    tl.store(inverse_ptr + at, inverse, mask=is_e)
    tl.store(gain_ptr + at, m / norm, mask=is_e)


class GainKernel:
    """Writes `gain_AE` and `inverse_norm_AE` of slots, for all target layers at once."""

    def __init__(
        self, slots: Slots, weights: Mapping[str, Tensor], square_norms: Mapping[str, Tensor]
    ) -> None:
        """All of one precision; the tensors must stay where they are."""
        self._slots = slots
        self._like = next(iter(weights.values()))
        layout = slots.layout
        jobs = list[list[int]]()
        for group, shape in enumerate(layout.groups):
            for member, name in enumerate(shape.names):
                low, high = shape.segments[member : member + 2]
                weight, d = weights[name], shape.in_features
                at_a = layout.a_offsets[group] + member * layout.rank * d
                at_m = layout.m_offsets[group] + low
                jobs += [
                    [
                        weight.data_ptr(),
                        square_norms[name].data_ptr(),
                        d,
                        weight.stride(0),
                        begin,
                        high - low,
                        at_a,
                        layout.b_offsets[group] + low,
                        shape.segments[-1],
                        at_m,
                        at_m - layout.ends[1],
                    ]
                    for begin in range(0, high - low, ROWS)
                ]
        self._is_aligned = all(job[at] % 16 == 0 for job in jobs for at in (0, 2, 3, 6))
        assert all(weight.stride(1) == 1 for weight in weights.values())
        self._jobs = torch.tensor(jobs, dtype=torch.int64).to(self._like.device)

    def refresh(self, which: Sequence[int]) -> None:
        """Work out the factors of these slots from their parameters."""
        slots, device = self._slots, self._like.device
        assert slots.gain_AE is not None
        assert slots.inverse_norm_AE is not None
        rank = slots.layout.rank
        ranks = max(16, triton.next_power_of_2(rank))
        # Turing has no TF32.
        exact = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        _gains[(len(which), len(self._jobs))](
            self._jobs,
            self._like,
            slots.params_AP,
            sent(torch.tensor(list(which), dtype=torch.int32), device),
            slots.scale_A,
            slots.gain_AE,
            slots.inverse_norm_AE,
            rank,
            slots.params_AP.stride(0),
            slots.gain_AE.stride(0),
            NUM_FIELDS=self._jobs.shape[1],
            ALIGNED=self._is_aligned,
            BE=ROWS,
            BD=32,
            BR=ranks,
            PRECISION="ieee" if exact else "tf32x3",
            num_warps=4 if ranks < 64 else 8,
            num_stages=3,
        )

"""Causal attention of rows laid end to end, forward and backward, as Triton kernels for short rows.

FlashAttention (Dao 2023, https://arxiv.org/abs/2307.08691): scores are never in memory, softmax in
float32 with a running maximum. What is different here: a program works on a block of one row, so
that no work is done for what another row's tokens would see; the heads that share a key head are
summed in the program that owns the keys, so that keys are not repeated; and no atomics: every sum
is in the same order at every repeat, and a row's numbers do not depend on where it lies.

The grid is as large as if every row were `longest_row` tokens long; programs that find nothing to
do end at once. So nothing about the rows is needed on the host.

What lies outside of a row is not read: another row's NaN does not come in by way of 0 * NaN.

Not covered: masks other than causal and a sliding window, dropout, more than 256 features a head.

Legend: M tokens end to end, B rows, H query heads, G key heads, D their width.
"""

# triton has no types, and is there with CUDA builds of torch alone.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """Query and key tokens that a program works on at a time, and how Triton compiles it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By the width of a head, filled up to a power of two. For 16 bits and large shared memory (A100,
# H100). Those of 64 and 128 are what benchmarks/attention_launches.py chose on an H200, over two
# kinds of rows together; the others are chosen so that ptxas for sm_90 spills no registers.
FORWARD = {
    16: Launch(64, 64, 4, 3),
    32: Launch(64, 64, 4, 3),
    64: Launch(64, 32, 4, 3),
    128: Launch(64, 32, 4, 3),
    256: Launch(64, 32, 4, 2),
}
# The backward of rows of any length: one pass for the queries' gradient, one for the keys'.
BACKWARD_QUERIES = {
    16: Launch(64, 64, 4, 2),
    32: Launch(64, 64, 4, 2),
    64: Launch(64, 64, 4, 3),
    128: Launch(64, 32, 4, 1),
    256: Launch(64, 32, 8, 2),
}
BACKWARD_KEYS = {
    16: Launch(32, 64, 4, 2),
    32: Launch(32, 64, 4, 2),
    64: Launch(32, 64, 4, 2),
    128: Launch(64, 64, 4, 2),
    256: Launch(32, 64, 8, 1),
}
# Where the longest row fits in one block of `keys`, one pass makes all three gradients, and the
# scores are computed once instead of twice. The first that fits is taken.
BACKWARD_WHOLE: dict[int, tuple[Launch, ...]] = {
    16: (Launch(32, 64, 4, 2), Launch(32, 128, 8, 2)),
    32: (Launch(32, 64, 4, 2), Launch(32, 128, 8, 2)),
    64: (Launch(32, 64, 4, 2), Launch(32, 128, 8, 2)),
    128: (Launch(32, 64, 4, 2), Launch(32, 128, 8, 2)),
    256: (),
}
# Less shared memory than this, or float32: `_cautious`.
LARGE_SHARED_BYTES = 160 * 1024


@triton.jit
def _load(ptr, rows, stride, is_row, D: tl.constexpr, BD: tl.constexpr):
    """Rows of D numbers, filled up with zeros to BD; zeros where not `is_row`.

    `ptr` is at the row's first token: offsets within a row fit in 32 bits, which saves registers.
    """
    ds = tl.arange(0, BD)
    mask = is_row[:, None] if D == BD else is_row[:, None] & (ds < D)[None, :]
    return tl.load(ptr + (rows[:, None] * stride + ds[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(ptr, rows, stride, values, is_row, D: tl.constexpr, BD: tl.constexpr):
    ds = tl.arange(0, BD)
    mask = is_row[:, None] if D == BD else is_row[:, None] & (ds < D)[None, :]
    at = ptr + (rows[:, None] * stride + ds[None, :])
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sees(queries, keys, window, WINDOWED: tl.constexpr):
    """Itself and what is before it, at most `window` tokens in all. Shapes are the caller's."""
    seen = keys <= queries
    if WINDOWED:
        seen &= keys > queries - window
    return seen


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    bounds_ptr,
    scale,
    window,
    num_tokens,
    num_heads,
    num_blocks,
    stride_qm,
    stride_qh,
    stride_km,
    stride_kh,
    stride_vm,
    stride_vh,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WINDOWED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o, and log2 of the sum of 2^(scores log2 e), of one block of a row's queries, one head."""
    # Heads that share keys follow one another; of a row, the last block has most to do.
    head = tl.program_id(0) % num_heads
    block = num_blocks - 1 - tl.program_id(0) // num_heads % num_blocks
    row = tl.program_id(0) // num_heads // num_blocks
    begin = tl.load(bounds_ptr + row)
    length = tl.load(bounds_ptr + row + 1) - begin
    first = block * BM
    if first >= length:
        return
    ms = first + tl.arange(0, BM)
    is_m = ms < length
    # Where the row and its heads begin.
    begin = begin.to(tl.int64)
    q_ptr += begin * stride_qm + head * stride_qh
    k_ptr += begin * stride_km + head // GROUP * stride_kh
    v_ptr += begin * stride_vm + head // GROUP * stride_vh
    o_ptr += (begin * num_heads + head) * D
    lse_ptr += head.to(tl.int64) * num_tokens + begin
    q = _load(q_ptr, ms, stride_qm, is_m, D, BD)
    scale *= 1.4426950408889634  # log2 e: exp2 is what the device has
    low = 0
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // BN * BN
    most = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    for n in range(low, tl.minimum(first + BM, length), BN):
        ns = n + tl.arange(0, BN)
        is_n = ns < length
        k = _load(k_ptr, ns, stride_km, is_n, D, BD)
        v = _load(v_ptr, ns, stride_vm, is_n, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(_sees(ms[:, None], ns[None, :], window, WINDOWED), s, float("-inf"))
        larger = tl.maximum(most, tl.max(s, 1))
        # A query that has seen nothing yet: its maximum is -inf, and -inf - -inf is no number.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(s * scale - (shift * scale)[:, None])
        shrunk = tl.exp2((most - shift) * scale)
        total = total * shrunk + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None], input_precision=PRECISION)
        most = larger
    _store(o_ptr, ms, num_heads * D, acc / total[:, None], is_m, D, BD)
    tl.store(lse_ptr + ms, most * scale + tl.log2(total), mask=is_m)


@triton.jit
def _backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    bounds_ptr,
    scale,
    window,
    num_tokens,
    num_heads,
    num_blocks,
    stride_qm,
    stride_qh,
    stride_km,
    stride_kh,
    stride_vm,
    stride_vh,
    stride_gm,
    stride_gh,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WINDOWED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and delta = sum(o do), of one block of a row's queries, one head.

    With P the softmax: dP = dO V', dS = P (dP - delta), dQ = scale dS K.
    """
    head = tl.program_id(0) % num_heads
    block = num_blocks - 1 - tl.program_id(0) // num_heads % num_blocks
    row = tl.program_id(0) // num_heads // num_blocks
    begin = tl.load(bounds_ptr + row)
    length = tl.load(bounds_ptr + row + 1) - begin
    first = block * BM
    if first >= length:
        return
    ms = first + tl.arange(0, BM)
    is_m = ms < length
    # Where the row and its heads begin.
    begin = begin.to(tl.int64)
    q_ptr += begin * stride_qm + head * stride_qh
    k_ptr += begin * stride_km + head // GROUP * stride_kh
    v_ptr += begin * stride_vm + head // GROUP * stride_vh
    do_ptr += begin * stride_gm + head * stride_gh
    at_o = (begin * num_heads + head) * D
    at_m = head.to(tl.int64) * num_tokens + begin + ms
    q = _load(q_ptr, ms, stride_qm, is_m, D, BD)
    do = _load(do_ptr, ms, stride_gm, is_m, D, BD)
    o = _load(o_ptr + at_o, ms, num_heads * D, is_m, D, BD)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + at_m, delta, mask=is_m)
    lse = tl.load(lse_ptr + at_m, mask=is_m, other=0.0)
    scale2 = scale * 1.4426950408889634
    low = 0
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // BN * BN
    dq = tl.zeros((BM, BD), dtype=tl.float32)
    for n in range(low, tl.minimum(first + BM, length), BN):
        ns = n + tl.arange(0, BN)
        is_n = ns < length
        k = _load(k_ptr, ns, stride_km, is_n, D, BD)
        v = _load(v_ptr, ns, stride_vm, is_n, D, BD)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * scale2 - lse[:, None])
        p = tl.where(_sees(ms[:, None], ns[None, :], window, WINDOWED), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(dq_ptr + at_o, ms, num_heads * D, dq * scale, is_m, D, BD)


@triton.jit
def _backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    bounds_ptr,
    scale,
    window,
    num_tokens,
    num_key_heads,
    num_blocks,
    stride_qm,
    stride_qh,
    stride_km,
    stride_kh,
    stride_vm,
    stride_vh,
    stride_gm,
    stride_gh,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WINDOWED: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one block of a row's keys, one key head: dV = P' dO, dK = scale dS' Q.

    Summed over the heads of the group. WHOLE: the block holds the whole row, so that dq is whole
    too, and delta is not there yet.
    """
    key_head = tl.program_id(0) % num_key_heads
    block = tl.program_id(0) // num_key_heads % num_blocks
    row = tl.program_id(0) // num_key_heads // num_blocks
    begin = tl.load(bounds_ptr + row)
    length = tl.load(bounds_ptr + row + 1) - begin
    first = block * BN
    if first >= length:
        return
    num_heads = num_key_heads * GROUP
    ns = first + tl.arange(0, BN)
    is_n = ns < length
    # Where the row and its heads begin.
    begin = begin.to(tl.int64)
    first_head = key_head * GROUP
    q_ptr += begin * stride_qm + first_head * stride_qh
    k_ptr += begin * stride_km + key_head * stride_kh
    v_ptr += begin * stride_vm + key_head * stride_vh
    do_ptr += begin * stride_gm + first_head * stride_gh
    at_o = (begin * num_heads + first_head) * D
    at_lse = first_head.to(tl.int64) * num_tokens + begin
    k = _load(k_ptr, ns, stride_km, is_n, D, BD)
    v = _load(v_ptr, ns, stride_vm, is_n, D, BD)
    scale2 = scale * 1.4426950408889634
    # No query before the first key sees any, none behind the window of the last.
    low = first // BM * BM
    stop = length
    if WINDOWED:
        stop = tl.minimum(length, first + BN - 1 + window)
    num_steps = tl.cdiv(stop - low, BM)
    dk = tl.zeros((BN, BD), dtype=tl.float32)
    dv = tl.zeros((BN, BD), dtype=tl.float32)
    # One loop over heads and blocks of queries: loads of the next are under way during the last.
    for step in range(0, GROUP * num_steps):
        head = step // num_steps
        ms = low + step % num_steps * BM + tl.arange(0, BM)
        is_m = ms < length
        at_m = at_lse + head.to(tl.int64) * num_tokens + ms
        q = _load(q_ptr + head * stride_qh, ms, stride_qm, is_m, D, BD)
        do = _load(do_ptr + head * stride_gh, ms, stride_gm, is_m, D, BD)
        lse = tl.load(lse_ptr + at_m, mask=is_m, other=float("inf"))
        if WHOLE:
            o = _load(o_ptr + at_o + head * D, ms, num_heads * D, is_m, D, BD)
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + at_m, mask=is_m, other=0.0)
        # Scores transposed, keys x queries: so P' and dS' are at hand.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale2 - lse[None, :])
        p = tl.where(_sees(ms[None, :], ns[:, None], window, WINDOWED), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if WHOLE:
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * scale
            _store(dq_ptr + at_o + head * D, ms, num_heads * D, dq, is_m, D, BD)
    at_k = (begin * num_key_heads + key_head) * D
    stride_k = num_key_heads * D
    _store(dk_ptr + at_k, ns, stride_k, dk * scale, is_n, D, BD)
    _store(dv_ptr + at_k, ns, stride_k, dv, is_n, D, BD)


def attention_forward(
    q_MHD: Tensor,
    k_MGD: Tensor,
    v_MGD: Tensor,
    row_bounds: Tensor,
    *,
    longest_row: int,
    scale: float,
    window: int | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """o, M x H x D, and for the backward float32[H, M], log2 of the sums that softmax divides by.

    Args:
        q_MHD, k_MGD, v_MGD: any strides but that of D, which is 1.
        row_bounds: int32[B + 1], ascending.
        longest_row: no row has more tokens.
        scale: what multiplies the scores; positive.
        window: how many tokens back, itself counted, a token sees; None: the whole row.
        launch: None: what the tables say.
    """
    assert scale > 0, scale
    num_tokens, num_heads, width = q_MHD.shape
    padded = _padded_width(width)
    if launch is None:
        launch = FORWARD[padded] if _is_large(q_MHD) else _cautious(q_MHD)
    o_MHD = torch.empty(q_MHD.shape, dtype=q_MHD.dtype, device=q_MHD.device)
    lse_HM = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q_MHD.device)
    num_blocks = triton.cdiv(longest_row, launch.queries)
    _forward[((len(row_bounds) - 1) * num_blocks * num_heads,)](
        q_MHD,
        k_MGD,
        v_MGD,
        o_MHD,
        lse_HM,
        row_bounds,
        scale,
        window or 0,
        num_tokens,
        num_heads,
        num_blocks,
        *q_MHD.stride()[:2],
        *k_MGD.stride()[:2],
        *v_MGD.stride()[:2],
        GROUP=num_heads // k_MGD.shape[1],
        D=width,
        BD=padded,
        WINDOWED=window is not None and window < longest_row,
        BM=launch.queries,
        BN=launch.keys,
        PRECISION=_precision(q_MHD),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return o_MHD, lse_HM


def attention_backward(
    grad_o_MHD: Tensor,
    q_MHD: Tensor,
    k_MGD: Tensor,
    v_MGD: Tensor,
    o_MHD: Tensor,
    lse_HM: Tensor,
    row_bounds: Tensor,
    *,
    longest_row: int,
    scale: float,
    window: int | None,
    launches: tuple[Launch | None, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous.

    Args:
        grad_o_MHD: any strides but that of D, which is 1.
        q_MHD, k_MGD, v_MGD, row_bounds, longest_row, scale, window: as in the forward.
        o_MHD, lse_HM: what the forward gave.
        launches: of the pass for the queries' gradient and of that for the keys'. Without the
            first, the second makes all; its `keys` must then hold the longest row. None: what the
            tables say.
    """
    num_tokens, num_heads, width = q_MHD.shape
    num_key_heads = k_MGD.shape[1]
    padded = _padded_width(width)
    for_queries, for_keys = launches or _backward_launches(q_MHD, padded, longest_row)
    assert for_queries is not None or longest_row <= for_keys.keys, (longest_row, for_keys)
    grad_q, grad_k, grad_v = (
        torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (q_MHD, k_MGD, v_MGD)
    )
    delta_HM = lse_HM if for_queries is None else torch.empty_like(lse_HM)
    num_rows = len(row_bounds) - 1
    strides = (
        *q_MHD.stride()[:2],
        *k_MGD.stride()[:2],
        *v_MGD.stride()[:2],
        *grad_o_MHD.stride()[:2],
    )
    sizes = {"GROUP": num_heads // num_key_heads, "D": width, "BD": padded}
    windowed = window is not None and window < longest_row
    if for_queries is not None:
        num_blocks = triton.cdiv(longest_row, for_queries.queries)
        _backward_queries[(num_rows * num_blocks * num_heads,)](
            q_MHD,
            k_MGD,
            v_MGD,
            o_MHD,
            grad_o_MHD,
            lse_HM,
            delta_HM,
            grad_q,
            row_bounds,
            scale,
            window or 0,
            num_tokens,
            num_heads,
            num_blocks,
            *strides,
            **sizes,
            WINDOWED=windowed,
            BM=for_queries.queries,
            BN=for_queries.keys,
            PRECISION=_precision(q_MHD),
            num_warps=for_queries.num_warps,
            num_stages=for_queries.num_stages,
        )
    num_blocks = triton.cdiv(longest_row, for_keys.keys)
    _backward_keys[(num_rows * num_blocks * num_key_heads,)](
        q_MHD,
        k_MGD,
        v_MGD,
        o_MHD,
        grad_o_MHD,
        lse_HM,
        delta_HM,
        grad_q,
        grad_k,
        grad_v,
        row_bounds,
        scale,
        window or 0,
        num_tokens,
        num_key_heads,
        num_blocks,
        *strides,
        **sizes,
        WINDOWED=windowed,
        WHOLE=for_queries is None,
        BM=for_keys.queries,
        BN=for_keys.keys,
        PRECISION=_precision(q_MHD),
        num_warps=for_keys.num_warps,
        num_stages=for_keys.num_stages,
    )
    return grad_q, grad_k, grad_v


def _padded_width(width: int) -> int:
    """A power of two from 16, which the matrix units need."""
    assert width <= 256, width
    return max(16, triton.next_power_of_2(width))


def _backward_launches(
    operand: Tensor, padded: int, longest_row: int
) -> tuple[Launch | None, Launch]:
    if not _is_large(operand):
        return _cautious(operand), _cautious(operand)
    for whole in BACKWARD_WHOLE[padded]:
        if longest_row <= whole.keys:
            return None, whole
    return BACKWARD_QUERIES[padded], BACKWARD_KEYS[padded]


def _is_large(operand: Tensor) -> bool:
    return operand.element_size() == 2 and _shared_bytes(operand.device.index) >= LARGE_SHARED_BYTES


@cache
def _shared_bytes(device: int) -> int:
    """Shared memory that a program can have."""
    known = triton.runtime.driver.active.utils.get_device_properties(device)
    return known["max_shared_mem"]


def _cautious(operand: Tensor) -> Launch:
    """Blocks whose four operands fit in small shared memory, 16 KiB each, or 8 KiB on sm_75.

    float32 is multiplied without matrix units, from registers: 8 KiB too.
    """
    ample = operand.element_size() == 2 and _shared_bytes(operand.device.index) >= 96 * 1024
    room = 16384 if ample else 8192
    row_bytes = _padded_width(operand.shape[-1]) * operand.element_size()
    block = max(16, min(64, room // row_bytes))
    return Launch(block, block, 4, 1)


def _precision(operand: Tensor) -> str:
    return "ieee" if operand.dtype == torch.float32 else "tf32"

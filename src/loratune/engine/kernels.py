"""Triton kernels: the products of `engine.grouped` over tiles, AdamW over rows, token losses.

Bound by memory traffic at the ranks that adapters have: `shrink` and `outer` read each large
operand once, `expand` writes its result once, and a frozen correction (the second factor of a list)
shares these passes. No atomics: every sum is in the same order at every repeat.

A tile never crosses two slots, and what lies outside of it is not read, so that one slot's NaN
reaches no other slot's tokens.

Legend: A slots, M tokens, K directions, N features, T tiles, C chunks.
"""

# triton has no types, and is there with CUDA builds of torch alone.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.engine.memory import sent
from loratune.engine.optimizer import RowUpdate, settings_table
from loratune.engine.routing import TILE, TOKENS_SUMMED_AT_ONCE, Routing
from loratune.engine.slots import Slots

SHRINK = {"BN": 64, "num_warps": 4, "num_stages": 4}
EXPAND = {"BN": 128, "num_warps": 4, "num_stages": 2}
RESCALE = {"BT": 32, "BN": 64, "num_warps": 4}
OUTER = {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _shrink(
    x_ptr,
    w_ptr,
    w2_ptr,
    h_ptr,
    h2_ptr,
    tile_slot,
    tile_begin,
    tile_end,
    K,
    N,
    stride_x,
    stride_wa,
    stride_wk,
    stride_h,
    TWO: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    slot = tl.load(tile_slot + tile)
    begin = tl.load(tile_begin + tile)
    end = tl.load(tile_end + tile)
    if begin >= end:
        return
    rows = begin + tl.arange(0, BM)
    is_row = rows < end
    ks = tl.program_id(1) * BK + tl.arange(0, BK)
    is_k = ks < K
    acc = tl.zeros((BM, BK), dtype=tl.float32)
    acc2 = tl.zeros((BM, BK), dtype=tl.float32)
    if slot >= 0:
        base_w = slot.to(tl.int64) * stride_wa
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
        for n in range(0, N, BN):
            ns = n + tl.arange(0, BN)
            is_n = ns < N
            x = tl.load(x_rows + ns[None, :], mask=is_row[:, None] & is_n[None, :], other=0.0)
            at_w = base_w + ks[None, :] * stride_wk + ns[:, None]
            w = tl.load(w_ptr + at_w, mask=is_k[None, :] & is_n[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if TWO:
                w2 = tl.load(w2_ptr + at_w, mask=is_k[None, :] & is_n[:, None], other=0.0)
                acc2 = tl.dot(x, w2, acc2, input_precision=PRECISION)
    at_h = rows.to(tl.int64)[:, None] * stride_h + ks[None, :]
    mask = is_row[:, None] & is_k[None, :]
    tl.store(h_ptr + at_h, acc.to(h_ptr.dtype.element_ty), mask=mask)
    if TWO:
        tl.store(h2_ptr + at_h, acc2.to(h2_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    h_ptr,
    h2_ptr,
    w_ptr,
    w2_ptr,
    bias_ptr,
    gain_ptr,
    y_ptr,
    kept_ptr,
    tile_slot,
    tile_begin,
    tile_end,
    K,
    N,
    end0,
    end1,
    stride_h,
    stride_wa,
    stride_wk,
    stride_gain,
    stride_y,
    stride_kept,
    TWO: tl.constexpr,
    BIAS: tl.constexpr,
    GAIN: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    slot = tl.load(tile_slot + tile)
    begin = tl.load(tile_begin + tile)
    end = tl.load(tile_end + tile)
    if begin >= end:
        return
    rows = begin + tl.arange(0, BM)
    is_row = rows < end
    # Blocks of N lie in one member each: members 0, 1 and 2 are [0, end0), [end0, end1), [end1, N).
    block = tl.program_id(1)
    blocks0 = tl.cdiv(end0, BN)
    blocks1 = blocks0 + tl.cdiv(end1 - end0, BN)
    low = tl.where(block >= blocks1, end1, tl.where(block >= blocks0, end0, 0))
    high = tl.where(block >= blocks1, N, tl.where(block >= blocks0, end1, end0))
    block -= tl.where(block >= blocks1, blocks1, tl.where(block >= blocks0, blocks0, 0))
    member = (low >= end0).to(tl.int32) + (low >= end1).to(tl.int32)
    ns = low + block * BN + tl.arange(0, BN)
    is_n = ns < high
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if slot >= 0:
        base_w = slot.to(tl.int64) * stride_wa
        for k in range(0, K, BK):
            ks = k + tl.arange(0, BK)
            is_k = ks < K
            at_h = rows.to(tl.int64)[:, None] * stride_h + (member * K + ks)[None, :]
            at_w = base_w + ks[:, None] * stride_wk + ns[None, :]
            h_mask = is_row[:, None] & is_k[None, :]
            w_mask = is_k[:, None] & is_n[None, :]
            h = tl.load(h_ptr + at_h, mask=h_mask, other=0.0)
            w = tl.load(w_ptr + at_w, mask=w_mask, other=0.0)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
            if TWO:
                h2 = tl.load(h2_ptr + at_h, mask=h_mask, other=0.0)
                w2 = tl.load(w2_ptr + at_w, mask=w_mask, other=0.0)
                acc = tl.dot(h2, w2, acc, input_precision=PRECISION)
    mask = is_row[:, None] & is_n[None, :]
    at_y = rows.to(tl.int64)[:, None] * stride_y + ns[None, :]
    if GAIN:
        acc += tl.load(y_ptr + at_y, mask=mask, other=0.0).to(tl.float32)
        if KEPT:
            at_kept = rows.to(tl.int64)[:, None] * stride_kept + ns[None, :]
            tl.store(kept_ptr + at_kept, acc.to(kept_ptr.dtype.element_ty), mask=mask)
        # Filler's gain is one.
        at_gain = tl.maximum(slot, 0).to(tl.int64) * stride_gain + ns
        acc *= tl.load(gain_ptr + at_gain, mask=is_n & (slot >= 0), other=1.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + ns, mask=is_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rescale_gradient(
    grad_ptr,
    y_ptr,
    into_ptr,
    part_ptr,
    gain_ptr,
    inverse_ptr,
    chunk_slot,
    chunk_begin,
    chunk_end,
    slot_bounds,
    num_chunks,
    num_slots,
    M,
    N,
    stride_grad,
    stride_y,
    stride_into,
    stride_part,
    stride_gain,
    stride_inverse,
    SIZE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    chunk = tl.program_id(1)
    # Filler has no chunks, and programs of its own: its gradients pass as they are.
    is_chunk = chunk < num_chunks
    filler = tl.load(slot_bounds + num_slots) + (chunk - num_chunks) * SIZE
    slot = tl.load(chunk_slot + chunk, mask=is_chunk, other=-1)
    begin = tl.where(is_chunk, tl.load(chunk_begin + chunk, mask=is_chunk, other=0), filler)
    end = tl.load(chunk_end + chunk, mask=is_chunk, other=0)
    end = tl.where(is_chunk, end, tl.minimum(filler + SIZE, M))
    if begin >= end:
        return
    ns = tl.program_id(0) * BN + tl.arange(0, BN)
    is_n = ns < N
    own = tl.maximum(slot, 0).to(tl.int64)
    is_own = is_n & (slot >= 0)
    gain = tl.load(gain_ptr + own * stride_gain + ns, mask=is_own, other=1.0)
    # What y was is of no interest to a slot that trains no magnitudes.
    is_seen = tl.load(inverse_ptr + own * stride_inverse + ns, mask=is_own, other=0.0) != 0
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for t in range(begin, end, BT):
        rows = (t + tl.arange(0, BT)).to(tl.int64)[:, None]
        mask = (rows < end) & is_n[None, :]
        seen = (rows < end) & is_seen[None, :]
        grad = tl.load(grad_ptr + rows * stride_grad + ns[None, :], mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        y = tl.load(y_ptr + rows * stride_y + ns[None, :], mask=seen, other=0.0)
        acc += grad * y.to(tl.float32)
        scaled = (grad * gain[None, :]).to(into_ptr.dtype.element_ty)
        tl.store(into_ptr + rows * stride_into + ns[None, :], scaled, mask=mask)
    at_part = part_ptr + chunk.to(tl.int64) * stride_part + ns
    tl.store(at_part, tl.sum(acc, axis=0), mask=is_seen)


@triton.jit
def _add_magnitudes(
    into_ptr,
    part_ptr,
    gain_ptr,
    inverse_ptr,
    slot_chunk,
    is_fresh,
    N,
    stride_into,
    stride_gain,
    stride_inverse,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(1)
    first = tl.load(slot_chunk + slot)
    last = tl.load(slot_chunk + slot + 1)
    if first >= last:
        return
    ns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = slot.to(tl.int64)
    inverse = tl.load(inverse_ptr + own * stride_inverse + ns, mask=ns < N, other=0.0)
    # Where nothing is trained no part was written.
    mask = (ns < N) & (inverse != 0)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for chunk in range(first, last):
        acc += tl.load(part_ptr + tl.cast(chunk, tl.int64) * N + ns, mask=mask, other=0.0)
    if SCALED:
        gain = tl.load(gain_ptr + own * stride_gain + ns, mask=mask, other=1.0)
        acc = tl.where(gain != 0, acc / tl.where(gain != 0, gain, 1.0), 0.0)
    acc = tl.where(inverse != 0, acc * inverse, 0.0)
    at = into_ptr + own * stride_into + ns
    if tl.load(is_fresh + slot) == 0:
        acc += tl.load(at, mask=ns < N, other=0.0)
    tl.store(at, acc, mask=ns < N)


@triton.jit
def _outer(
    h_ptr,
    h2_ptr,
    x_ptr,
    g_ptr,
    part_ptr,
    scale_ptr,
    chunk_slot,
    chunk_begin,
    chunk_end,
    slot_chunk,
    is_fresh,
    K,
    N,
    stride_h,
    stride_x,
    stride_ga,
    stride_gk,
    num_n_blocks,
    TWO: tl.constexpr,
    SCALED: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(1)
    n_block = tl.program_id(0) % num_n_blocks
    k_block = tl.program_id(0) // num_n_blocks
    slot = tl.load(chunk_slot + chunk)
    if slot < 0:
        return
    begin = tl.load(chunk_begin + chunk)
    end = tl.load(chunk_end + chunk)
    ns = n_block * BN + tl.arange(0, BN)
    is_n = ns < N
    ks = k_block * BK + tl.arange(0, BK)
    is_k = ks < K
    acc = tl.zeros((BK, BN), dtype=tl.float32)
    for t in range(begin, end, BT):
        rows = t + tl.arange(0, BT)
        is_row = rows < end
        at_h = rows.to(tl.int64)[None, :] * stride_h + ks[:, None]
        h_mask = is_row[None, :] & is_k[:, None]
        h = tl.load(h_ptr + at_h, mask=h_mask, other=0.0)
        if TWO:
            h = (h.to(tl.float32) + tl.load(h2_ptr + at_h, mask=h_mask, other=0.0)).to(
                h_ptr.dtype.element_ty
            )
        at_x = rows.to(tl.int64)[:, None] * stride_x + ns[None, :]
        x = tl.load(x_ptr + at_x, mask=is_row[:, None] & is_n[None, :], other=0.0)
        acc = tl.dot(h, x, acc, input_precision=PRECISION)
    if SCALED:
        acc *= tl.load(scale_ptr + slot)
    mask = is_k[:, None] & is_n[None, :]
    first = tl.load(slot_chunk + slot)
    last = tl.load(slot_chunk + slot + 1)
    if last - first == 1:
        at_g = g_ptr + slot.to(tl.int64) * stride_ga + ks[:, None] * stride_gk + ns[None, :]
        if tl.load(is_fresh + slot) == 0:
            acc += tl.load(at_g, mask=mask, other=0.0)
        tl.store(at_g, acc, mask=mask)
    else:
        inside = ks[:, None] * N + ns[None, :]
        tl.store(part_ptr + chunk.to(tl.int64) * K * N + inside, acc, mask=mask)


@triton.jit
def _sum_chunks(
    g_ptr,
    part_ptr,
    slot_chunk,
    is_fresh,
    size,
    N,
    stride_ga,
    stride_gk,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(1)
    first = tl.load(slot_chunk + slot)
    last = tl.load(slot_chunk + slot + 1)
    if last - first < 2:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    at_g = g_ptr + slot.to(tl.int64) * stride_ga + (at // N) * stride_gk + at % N
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    if tl.load(is_fresh + slot) == 0:
        acc = tl.load(at_g, mask=mask, other=0.0)
    for chunk in range(first, last):
        acc += tl.load(part_ptr + tl.cast(chunk, tl.int64) * size + at, mask=mask, other=0.0)
    tl.store(at_g, acc, mask=mask)


@triton.jit
def _token_losses(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    losses_ptr,
    V,
    stride,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row = logits_ptr + token.to(tl.int64) * stride
    label = tl.load(labels_ptr + token)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for v in range(0, V, BLOCK):
        at = v + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        # Nothing but -inf so far: nothing to rescale.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = larger
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    tl.store(losses_ptr + token, log_sum - tl.load(row + label).to(tl.float32))
    if GRADIENT:
        weight = tl.load(weights_ptr + token)
        for v in range(0, V, BLOCK):
            at = v + tl.arange(0, BLOCK)
            x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
            g = (tl.exp(x - log_sum) - tl.where(at == label, 1.0, 0.0)) * weight
            tl.store(row + at, g.to(logits_ptr.dtype.element_ty), mask=at < V)


def token_losses(
    logits_LV: Tensor, labels_L: Tensor, weights_L: Tensor, *, with_gradient: bool
) -> Tensor:
    """float32[L] losses in nats; with the gradient, it is written over the logits.

    Softmax in float32, the logits read twice (the second time mostly from cache).
    """
    losses_L = torch.empty(len(labels_L), dtype=torch.float32, device=logits_LV.device)
    _token_losses[(len(labels_L),)](
        logits_LV,
        labels_L,
        weights_L,
        losses_L,
        logits_LV.shape[1],
        logits_LV.stride(0),
        GRADIENT=with_gradient,
        BLOCK=4096,
        num_warps=8,
    )
    return losses_L


class TritonProducts:
    """`engine.grouped.GroupedProducts` on CUDA."""

    def __init__(self) -> None:
        # Float32 workspaces in which the chunks of a slot wait for their sum.
        self._parts: dict[torch.device, list[Tensor]] = {}

    def shrink(
        self,
        x_MN: Tensor,
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        into: Sequence[Tensor],
    ) -> None:
        """See `engine.grouped.GroupedProducts`."""
        w = ws_AKN[0]
        _, num_directions, num_features = w.shape
        block_k = _block(num_directions, most=64 if len(ws_AKN) == 2 else 128)
        _shrink[(len(routing.tile_slot_T), triton.cdiv(num_directions, block_k))](
            x_MN,
            w,
            ws_AKN[-1],
            into[0],
            into[-1],
            routing.tile_slot_T,
            routing.tile_begin_T,
            routing.tile_end_T,
            num_directions,
            num_features,
            x_MN.stride(0),
            w.stride(0),
            w.stride(1),
            into[0].stride(0),
            TWO=len(ws_AKN) == 2,
            BM=TILE,
            BK=block_k,
            PRECISION=_precision(x_MN),
            **SHRINK,
        )

    def expand(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        into_MN: Tensor,
        bias_N: Tensor | None = None,
        segments: Sequence[int] | None = None,
    ) -> None:
        """See `engine.grouped.GroupedProducts`."""
        _launch_expand(
            hs_MK,
            ws_AKN,
            routing,
            into_MN=into_MN,
            bias_N=bias_N,
            gain_AN=None,
            kept_MN=None,
            segments=segments,
        )

    def expand_rescaled(
        self,
        hs_MK: Sequence[Tensor],
        ws_AKN: Sequence[Tensor],
        routing: Routing,
        *,
        onto_MN: Tensor,
        gain_AN: Tensor,
        bias_N: Tensor | None,
        kept_MN: Tensor | None,
        segments: Sequence[int],
    ) -> None:
        """See `engine.grouped.GroupedProducts`."""
        _launch_expand(
            hs_MK,
            ws_AKN,
            routing,
            into_MN=onto_MN,
            bias_N=bias_N,
            gain_AN=gain_AN,
            kept_MN=kept_MN,
            segments=segments,
        )

    def rescale_gradient(
        self,
        grads: Sequence[Tensor],
        y_MN: Tensor,
        routing: Routing,
        *,
        gain_AN: Tensor,
        inverse_norm_AN: Tensor,
        is_scaled: bool,
        into_MN: Tensor,
        into_AN: Tensor,
    ) -> None:
        """See `engine.grouped.GroupedProducts`."""
        num_tokens, num_features = into_MN.shape
        num_slots, num_chunks = len(into_AN), len(routing.chunk_slot_C)
        parts = self._workspace(num_chunks * num_features, into_MN.device)
        parts = parts[: num_chunks * num_features].view(num_chunks, num_features)
        low = 0
        for grad in grads:
            outputs = slice(low, low + grad.shape[1])
            low = outputs.stop
            y, into, part = y_MN[:, outputs], into_MN[:, outputs], parts[:, outputs]
            gain, inverse = gain_AN[:, outputs], inverse_norm_AN[:, outputs]
            num_n_blocks = triton.cdiv(grad.shape[1], RESCALE["BN"])
            _rescale_gradient[
                (num_n_blocks, num_chunks + triton.cdiv(num_tokens, TOKENS_SUMMED_AT_ONCE))
            ](
                grad,
                y,
                into,
                part,
                gain,
                inverse,
                routing.chunk_slot_C,
                routing.chunk_begin_C,
                routing.chunk_end_C,
                routing.slot_bounds_A,
                num_chunks,
                num_slots,
                num_tokens,
                grad.shape[1],
                grad.stride(0),
                y.stride(0),
                into.stride(0),
                part.stride(0),
                gain.stride(0),
                inverse.stride(0),
                SIZE=TOKENS_SUMMED_AT_ONCE,
                **RESCALE,
            )
        _add_magnitudes[(triton.cdiv(num_features, 512), num_slots)](
            into_AN,
            parts,
            gain_AN,
            inverse_norm_AN,
            routing.slot_chunk_A,
            routing.is_fresh_A,
            num_features,
            into_AN.stride(0),
            gain_AN.stride(0),
            inverse_norm_AN.stride(0),
            SCALED=is_scaled,
            BLOCK=512,
        )

    def outer(
        self,
        hs_MK: Sequence[Tensor],
        x_MN: Tensor,
        routing: Routing,
        *,
        into_AKN: Tensor,
        scale_A: Tensor | None = None,
    ) -> None:
        """See `engine.grouped.GroupedProducts`."""
        h = hs_MK[0]
        num_slots, num_directions, num_features = into_AKN.shape
        block_k = _block(num_directions, most=64)
        num_n_blocks = triton.cdiv(num_features, OUTER["BN"])
        num_chunks = len(routing.chunk_slot_C)
        size = num_directions * num_features
        parts = self._workspace(num_chunks * size, h.device)
        _outer[(num_n_blocks * triton.cdiv(num_directions, block_k), num_chunks)](
            h,
            hs_MK[-1],
            x_MN,
            into_AKN,
            parts,
            into_AKN if scale_A is None else scale_A,
            routing.chunk_slot_C,
            routing.chunk_begin_C,
            routing.chunk_end_C,
            routing.slot_chunk_A,
            routing.is_fresh_A,
            num_directions,
            num_features,
            h.stride(0),
            x_MN.stride(0),
            into_AKN.stride(0),
            into_AKN.stride(1),
            num_n_blocks,
            TWO=len(hs_MK) == 2,
            SCALED=scale_A is not None,
            BK=block_k,
            PRECISION=_precision(h),
            **OUTER,
        )
        _sum_chunks[(triton.cdiv(size, 1024), num_slots)](
            into_AKN,
            parts,
            routing.slot_chunk_A,
            routing.is_fresh_A,
            size,
            num_features,
            into_AKN.stride(0),
            into_AKN.stride(1),
            BLOCK=1024,
        )

    def _workspace(self, size: int, device: torch.device) -> Tensor:
        """One buffer for all layers: they use it one after another, on one stream.

        Smaller ones are kept: a captured step goes on using the one that it was captured with.
        """
        known = self._parts.setdefault(device, [])
        if not known or known[-1].numel() < size:
            known.append(torch.empty(size, dtype=torch.float32, device=device))
        return known[-1]


def _launch_expand(
    hs_MK: Sequence[Tensor],
    ws_AKN: Sequence[Tensor],
    routing: Routing,
    *,
    into_MN: Tensor,
    bias_N: Tensor | None,
    gain_AN: Tensor | None,
    kept_MN: Tensor | None,
    segments: Sequence[int] | None,
) -> None:
    h, w = hs_MK[0], ws_AKN[0]
    num_features = w.shape[2]
    ends = [num_features] if segments is None else list(segments[1:])
    assert len(ends) <= 3, segments
    end0, end1, _ = (*ends, num_features, num_features)[:3]
    blocks = [
        triton.cdiv(high - low, EXPAND["BN"])
        for low, high in pairwise((0, end0, end1, num_features))
    ]
    _expand[(len(routing.tile_slot_T), sum(blocks))](
        h,
        hs_MK[-1],
        w,
        ws_AKN[-1],
        h if bias_N is None else bias_N,
        h if gain_AN is None else gain_AN,
        into_MN,
        into_MN if kept_MN is None else kept_MN,
        routing.tile_slot_T,
        routing.tile_begin_T,
        routing.tile_end_T,
        w.shape[1],
        num_features,
        end0,
        end1,
        h.stride(0),
        w.stride(0),
        w.stride(1),
        0 if gain_AN is None else gain_AN.stride(0),
        into_MN.stride(0),
        0 if kept_MN is None else kept_MN.stride(0),
        TWO=len(ws_AKN) == 2,
        BIAS=bias_N is not None,
        GAIN=gain_AN is not None,
        KEPT=kept_MN is not None,
        BM=TILE,
        BK=_block(w.shape[1], most=64),
        PRECISION=_precision(h),
        **EXPAND,
    )


def _block(size: int, *, most: int) -> int:
    """A power of two from 16, which the matrix units need, to `most`."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _precision(operand: Tensor) -> str:
    return "ieee" if operand.dtype == torch.float32 else "tf32"


@triton.jit
def _square_sums(g_ptr, slots_ptr, partial_ptr, size, stride_g, num_blocks, BLOCK: tl.constexpr):
    which = tl.program_id(1)
    block = tl.program_id(0)
    slot = tl.load(slots_ptr + which)
    at = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + slot.to(tl.int64) * stride_g + at, mask=at < size, other=0.0)
    tl.store(partial_ptr + which * num_blocks + block, tl.sum(g * g))


@triton.jit
def _adamw(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    trained_ptr,
    correction_ptr,
    frozen_ptr,
    slots_ptr,
    settings_ptr,
    norms_ptr,
    scale_ptr,
    size,
    end_a,
    end_b,
    stride_row,
    stride_factors,
    NUM_SETTINGS: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(1)
    slot = tl.load(slots_ptr + which).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    row = slot * stride_row + at
    s = settings_ptr + which * NUM_SETTINGS
    region = (at >= end_a).to(tl.int32) + (at >= end_b).to(tl.int32)
    lr = tl.load(s + region)
    eps = tl.load(s + 3 + region)
    decay = tl.load(s + 6 + region)
    beta1, one_less_beta1 = tl.load(s + 9), tl.load(s + 10)
    beta2, one_less_beta2 = tl.load(s + 11), tl.load(s + 12)
    correct1, correct2 = tl.load(s + 13), tl.load(s + 14)
    norm = tl.load(norms_ptr + which)
    if not (norm < float("inf")):  # NaN too: the trial has diverged, or its loss scale is too large
        return
    clip = tl.minimum(tl.load(s + 15) / (norm + 1e-6), 1.0)

    g = tl.load(g_ptr + row, mask=mask, other=0.0) * tl.load(s + 16) * clip
    p = tl.load(p_ptr + row, mask=mask, other=0.0)
    m = tl.load(m_ptr + row, mask=mask, other=0.0)
    v = tl.load(v_ptr + row, mask=mask, other=0.0)
    p -= decay * p
    m = beta1 * m + one_less_beta1 * g
    v = beta2 * v + one_less_beta2 * g * g
    p -= lr * correct1 * m / (tl.sqrt(v) * correct2 + eps)
    tl.store(p_ptr + row, p, mask=mask)
    tl.store(m_ptr + row, m, mask=mask)
    tl.store(v_ptr + row, v, mask=mask)

    scale = tl.where(at >= end_a, tl.load(scale_ptr + slot), 1.0)
    product = at < end_b
    factor = slot * stride_factors + at
    if CORRECTED:
        frozen = tl.load(frozen_ptr + factor, mask=product, other=0.0)
        difference = scale * (p - frozen)
        is_a = at < end_a
        tl.store(
            trained_ptr + factor,
            tl.where(is_a, difference, scale * p).to(trained_ptr.dtype.element_ty),
            mask=product,
        )
        # A0 was written when the trial began.
        tl.store(
            correction_ptr + factor,
            difference.to(correction_ptr.dtype.element_ty),
            mask=product & (at >= end_a),
        )
    else:
        tl.store(trained_ptr + factor, (scale * p).to(trained_ptr.dtype.element_ty), mask=product)


def adamw_rows(slots: Slots, updates: Sequence[RowUpdate]) -> Tensor:
    """`engine.optimizer.update_rows` on CUDA, in four launches whatever the number of rows."""
    device = slots.params_AP.device
    size, (end_a, end_b, _) = slots.layout.size, slots.layout.ends
    which = sent(torch.tensor([one.slot for one in updates], dtype=torch.int32), device)
    table = sent(torch.tensor(settings_table(updates), dtype=torch.float32), device)
    block = 4096
    num_blocks = triton.cdiv(size, block)
    partial = torch.empty(len(updates), num_blocks, dtype=torch.float32, device=device)
    _square_sums[(num_blocks, len(updates))](
        slots.grads_AP, which, partial, size, slots.grads_AP.stride(0), num_blocks, BLOCK=block
    )
    norms = partial.sum(dim=1).sqrt() * table[:, 16]
    trained = slots.factors[0]
    block = 1024
    _adamw[(triton.cdiv(size, block), len(updates))](
        slots.params_AP,
        slots.grads_AP,
        slots.first_AP,
        slots.second_AP,
        trained,
        slots.factors[-1],
        trained if slots.frozen_AP is None else slots.frozen_AP,
        which,
        table,
        norms,
        slots.scale_A,
        size,
        end_a,
        end_b,
        slots.params_AP.stride(0),
        trained.stride(0),
        NUM_SETTINGS=table.shape[1],
        CORRECTED=slots.frozen_AP is not None,
        BLOCK=block,
    )
    return norms

"""Triton kernels of decoding: attention over slots, and low-rank products of few rows an adapter.

What bounds the attention of one token a row is reading its keys and values once. A program owns one
key head of one row, so that the heads that share it read it together (16 queries, the fewest that
matrix units take; the rows of that block beyond the group are filler). Where rows are few, a row's
keys are split over several programs, and a second kernel adds their parts up: FlashDecoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). No atomics: same sums at every repeat.

The low-rank products are those of `engine.kernels` for steps of hundreds of rows instead of
thousands of tokens: the features that `shrink` sums over are split over programs as well, `expand`
adds the parts up (in order, in float32) where it reads them, and does all members of a group.

The number of programs depends on the number of rows alone, lengths are read on the device.

Legend: M rows, S slots, G key heads, H heads, D width of a key, E of a value; A seats,
K directions, R rank, N features.
"""

# triton has no types, and is there with CUDA builds of torch alone.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.engine.attention_kernels import Launch, _is_large, _padded_width, _precision
from loratune.engine.kernels import EXPAND, SHRINK, _block
from loratune.engine.routing import TILE, Routing

# As many programs as keep a large device busy, twice its processors: fewer, and rows are split.
BUSY = 264
MOST_SPLITS = 16
# No program of `shrink` sums over fewer features than this, in blocks of SHRINK's.
FEWEST_FEATURES = 256


@triton.jit
def _store(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    slot_ptr,
    position_ptr,
    room,
    num_key_heads,
    stride_km,
    stride_kg,
    stride_vm,
    stride_vg,
    D: tl.constexpr,
    BD: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    position = tl.load(position_ptr + token).to(tl.int64)
    place = (slot * num_key_heads + head) * room + position
    ds = tl.arange(0, BD)
    k = tl.load(k_ptr + token * stride_km + head * stride_kg + ds, mask=ds < D, other=0.0)
    tl.store(keys_ptr + place * D + ds, k, mask=ds < D)
    es = tl.arange(0, BE)
    v = tl.load(v_ptr + token * stride_vm + head * stride_vg + es, mask=es < E, other=0.0)
    tl.store(values_ptr + place * E + es, v, mask=es < E)


def store_tokens(
    key_MGD: Tensor,
    value_MGE: Tensor,
    keys_SGLD: Tensor,
    values_SGLE: Tensor,
    slot_M: Tensor,
    position_M: Tensor,
) -> None:
    """Write each token's key and value to its place; the caches are contiguous."""
    num_tokens, num_key_heads, width = key_MGD.shape
    value_width = value_MGE.shape[-1]
    _store[(num_tokens, num_key_heads)](
        key_MGD,
        value_MGE,
        keys_SGLD,
        values_SGLE,
        slot_M,
        position_M,
        keys_SGLD.shape[2],
        num_key_heads,
        *key_MGD.stride()[:2],
        *value_MGE.stride()[:2],
        D=width,
        BD=triton.next_power_of_2(width),
        E=value_width,
        BE=triton.next_power_of_2(value_width),
        num_warps=1,
    )


@triton.jit
def _attend(
    q_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    lse_ptr,
    slot_ptr,
    position_ptr,
    scale,
    window,
    room,
    num_key_heads,
    stride_qm,
    stride_qh,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    WINDOWED: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key head of one row over one part of its keys, for all the heads that share it."""
    key_head = tl.program_id(0) % num_key_heads
    row = tl.program_id(0) // num_key_heads
    split = tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    length = tl.load(position_ptr + row).to(tl.int32) + 1
    low = 0
    if WINDOWED:
        low = tl.maximum(length - window, 0)
    part = tl.cdiv(length - low, SPLITS)
    first = low + split * part
    end = tl.minimum(first + part, length)
    hs = tl.arange(0, BG)
    ds = tl.arange(0, BD)
    es = tl.arange(0, BE)
    head = key_head * GROUP + hs
    is_head = hs < GROUP
    at_q = row.to(tl.int64) * stride_qm + head[:, None] * stride_qh + ds[None, :]
    q = tl.load(q_ptr + at_q, mask=is_head[:, None] & (ds < D)[None, :], other=0.0)
    keys_ptr += (slot * num_key_heads + key_head) * room * D
    values_ptr += (slot * num_key_heads + key_head) * room * E
    scale *= 1.4426950408889634  # log2 e: exp2 is what the device has
    most = tl.full((BG,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BG,), dtype=tl.float32)
    acc = tl.zeros((BG, BE), dtype=tl.float32)
    for n in range(first, end, BN):
        ns = n + tl.arange(0, BN)
        is_n = ns < end
        k = tl.load(
            keys_ptr + ns[:, None] * D + ds[None, :],
            mask=is_n[:, None] & (ds < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            values_ptr + ns[:, None] * E + es[None, :],
            mask=is_n[:, None] & (es < E)[None, :],
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(is_n[None, :], s, float("-inf"))
        # Of every block that is looked at, one key at least is seen: no maximum is -inf.
        larger = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2((s - larger[:, None]) * scale)
        shrunk = tl.exp2((most - larger) * scale)
        total = total * shrunk + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrunk[:, None], input_precision=PRECISION)
        most = larger
    # A part without keys has a total of 0: it counts nothing, and must not be NaN.
    divisor = tl.where(total > 0, total, 1.0)
    acc = acc / divisor[:, None]
    at = (row.to(tl.int64) * num_key_heads * GROUP + head) * SPLITS + split
    mask = is_head[:, None] & (es < E)[None, :]
    tl.store(out_ptr + at[:, None] * E + es[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    if SPLITS > 1:
        lse = tl.where(total > 0, most * scale + tl.log2(divisor), float("-inf"))
        tl.store(lse_ptr + at, lse, mask=is_head)


@triton.jit
def _add_up(
    part_ptr,
    lse_ptr,
    out_ptr,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
):
    """One head of one row: the mean of its parts, weighted by the sums that they divided by."""
    at = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    es = tl.arange(0, BE)
    lse = tl.load(lse_ptr + at * SPLITS + splits)
    weight = tl.exp2(lse - tl.max(lse, 0))
    part = tl.load(
        part_ptr + (at * SPLITS + splits)[:, None] * E + es[None, :],
        mask=(es < E)[None, :],
        other=0.0,
    )
    summed = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + at * E + es, summed.to(out_ptr.dtype.element_ty), mask=es < E)


def attend_to_slots(
    q_MHD: Tensor,
    keys_SGLD: Tensor,
    values_SGLE: Tensor,
    slot_M: Tensor,
    position_M: Tensor,
    *,
    scale: float,
    window: int | None,
    launch: Launch | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """M x H x E: each token over the keys of its slot up to its own place.

    Args:
        q_MHD: any strides but that of D, which is 1.
        keys_SGLD, values_SGLE: contiguous.
        slot_M, position_M: int64.
        scale: what multiplies the scores; positive.
        window: how many tokens back, itself counted, a token sees; None: all.
        launch: `keys` is how many are read at a time, `queries` is not used; None: by the device.
        num_splits: a power of two; None: by the number of rows.
    """
    assert scale > 0, scale
    num_rows, num_heads, width = q_MHD.shape
    num_key_heads, room = keys_SGLD.shape[1:3]
    value_width = values_SGLE.shape[-1]
    padded = max(_padded_width(width), _padded_width(value_width))
    if launch is None:
        launch = _launch(q_MHD, padded)
    splits = num_splits or _num_splits(num_rows * num_key_heads)
    out = torch.empty(num_rows, num_heads, value_width, dtype=q_MHD.dtype, device=q_MHD.device)
    parts, lse = out, out
    if splits > 1:
        parts = torch.empty(
            num_rows * num_heads * splits, value_width, dtype=torch.float32, device=q_MHD.device
        )
        lse = torch.empty(len(parts), dtype=torch.float32, device=q_MHD.device)
    group = num_heads // num_key_heads
    _attend[(num_rows * num_key_heads, splits)](
        q_MHD,
        keys_SGLD,
        values_SGLE,
        parts,
        lse,
        slot_M,
        position_M,
        scale,
        window or 0,
        room,
        num_key_heads,
        *q_MHD.stride()[:2],
        SPLITS=splits,
        GROUP=group,
        BG=max(16, triton.next_power_of_2(group)),
        D=width,
        BD=_padded_width(width),
        E=value_width,
        BE=_padded_width(value_width),
        WINDOWED=window is not None,
        BN=launch.keys,
        PRECISION=_precision(q_MHD),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if splits > 1:
        _add_up[(num_rows * num_heads,)](
            parts,
            lse,
            out,
            SPLITS=splits,
            E=value_width,
            BE=triton.next_power_of_2(value_width),
            num_warps=1,
        )
    return out


def _num_splits(num_programs: int) -> int:
    """A power of two that makes the programs enough, within reason."""
    wanted = triton.cdiv(BUSY, num_programs)
    return min(MOST_SPLITS, triton.next_power_of_2(wanted))


def _launch(operand: Tensor, padded: int) -> Launch:
    """Not measured. Keys and values of one block are 16 KiB at 64 features of 16 bits."""
    if _is_large(operand):
        return Launch(16, 64 if padded <= 128 else 32, 4, 3)
    # 8 KiB each of small shared memory, one block at a time.
    keys = max(16, min(64, 8192 // (padded * operand.element_size())))
    return Launch(16, keys, 4, 1)


@triton.jit
def _shrink_parts(
    x_ptr,
    w_ptr,
    part_ptr,
    tile_slot,
    tile_begin,
    tile_end,
    K,
    N,
    features,
    num_tokens,
    stride_x,
    stride_wa,
    stride_wk,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(2)
    slot = tl.load(tile_slot + tile)
    begin = tl.load(tile_begin + tile)
    end = tl.load(tile_end + tile)
    # Nobody reads the parts of filler.
    if slot < 0:
        return
    rows = begin + tl.arange(0, BM)
    is_row = rows < end
    ks = tl.program_id(1) * BK + tl.arange(0, BK)
    is_k = ks < K
    first = split * features
    last = tl.minimum(first + features, N)
    base_w = slot.to(tl.int64) * stride_wa
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    acc = tl.zeros((BM, BK), dtype=tl.float32)
    for n in range(first, last, BN):
        ns = n + tl.arange(0, BN)
        is_n = ns < last
        x = tl.load(x_rows + ns[None, :], mask=is_row[:, None] & is_n[None, :], other=0.0)
        at_w = base_w + ks[None, :] * stride_wk + ns[:, None]
        w = tl.load(w_ptr + at_w, mask=is_k[None, :] & is_n[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    at = (split * num_tokens + rows).to(tl.int64)[:, None] * K + ks[None, :]
    tl.store(part_ptr + at, acc, mask=is_row[:, None] & is_k[None, :])


@triton.jit
def _expand_parts(
    part_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    tile_slot,
    tile_begin,
    tile_end,
    block_ptr,
    R,
    K,
    num_tokens,
    stride_wa,
    stride_wk,
    stride_y,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    block = block_ptr + 3 * tl.program_id(1)
    slot = tl.load(tile_slot + tile)
    begin = tl.load(tile_begin + tile)
    end = tl.load(tile_end + tile)
    if begin >= end:
        return
    rows = begin + tl.arange(0, BM)
    is_row = rows < end
    # The features of this block, all of one member, and where its directions begin.
    ns = tl.load(block) + tl.arange(0, BN)
    is_n = ns < tl.load(block + 1)
    first = tl.load(block + 2)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if slot >= 0:
        base_w = slot.to(tl.int64) * stride_wa
        for r in range(0, R, BR):
            rs = r + tl.arange(0, BR)
            is_r = rs < R
            h = tl.zeros((BM, BR), dtype=tl.float32)
            for split in range(0, SPLITS):
                at_h = (split * num_tokens + rows).to(tl.int64)[:, None] * K
                h += tl.load(
                    part_ptr + at_h + (first + rs)[None, :],
                    mask=is_row[:, None] & is_r[None, :],
                    other=0.0,
                )
            at_w = base_w + rs[:, None] * stride_wk + ns[None, :]
            w = tl.load(w_ptr + at_w, mask=is_r[:, None] & is_n[None, :], other=0.0)
            acc = tl.dot(h.to(w.dtype), w, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + ns, mask=is_n, other=0.0).to(tl.float32)[None, :]
    at_y = rows.to(tl.int64)[:, None] * stride_y + ns[None, :]
    tl.store(y_ptr + at_y, acc.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_n[None, :])


def adapter_outputs(
    x_MD: Tensor,
    down_AKD: Tensor,
    up_ARE: Tensor,
    routing: Routing,
    *,
    blocks: Tensor,
    bias_E: Tensor | None,
    num_splits: int | None = None,
) -> Tensor:
    """M x E: each token through its own seat's factors, and the bias; filler gets that alone.

    Args:
        x_MD: any stride of M.
        down_AKD: the members' directions one after the other, R each.
        up_ARE: the members' outputs side by side.
        routing: which token has which seat.
        blocks: see `output_blocks`.
        bias_E: None: there is none.
        num_splits: over how many programs features are split; None: by the number of tiles.
    """
    num_tokens, num_features = x_MD.shape
    _, num_directions, _ = down_AKD.shape
    _, rank, num_outputs = up_ARE.shape
    num_tiles = len(routing.tile_slot_T)
    block_k = _block(num_directions, most=128)
    num_k_blocks = triton.cdiv(num_directions, block_k)
    if num_splits is None:
        most = max(1, num_features // FEWEST_FEATURES)
        num_splits = min(most, _num_splits(num_tiles * num_k_blocks))
    step = SHRINK["BN"]
    features = triton.cdiv(triton.cdiv(num_features, num_splits), step) * step
    parts = torch.empty(
        num_splits, num_tokens, num_directions, dtype=torch.float32, device=x_MD.device
    )
    _shrink_parts[(num_tiles, num_k_blocks, num_splits)](
        x_MD,
        down_AKD,
        parts,
        routing.tile_slot_T,
        routing.tile_begin_T,
        routing.tile_end_T,
        num_directions,
        num_features,
        features,
        num_tokens,
        x_MD.stride(0),
        down_AKD.stride(0),
        down_AKD.stride(1),
        BM=TILE,
        BK=block_k,
        PRECISION=_precision(x_MD),
        **SHRINK,
    )
    y_ME = torch.empty(num_tokens, num_outputs, dtype=x_MD.dtype, device=x_MD.device)
    _expand_parts[(num_tiles, len(blocks))](
        parts,
        up_ARE,
        y_ME if bias_E is None else bias_E,
        y_ME,
        routing.tile_slot_T,
        routing.tile_begin_T,
        routing.tile_end_T,
        blocks,
        rank,
        num_directions,
        num_tokens,
        up_ARE.stride(0),
        up_ARE.stride(1),
        y_ME.stride(0),
        SPLITS=num_splits,
        BIAS=bias_E is not None,
        BM=TILE,
        BR=_block(rank, most=64),
        PRECISION=_precision(x_MD),
        **EXPAND,
    )
    return y_ME


def output_blocks(segments: Sequence[int], *, rank: int, device: torch.device) -> Tensor:
    """int32[blocks, 3]: first feature, bound of its member, first direction of its member."""
    rows = [
        (begin, high, member * rank)
        for member, (low, high) in enumerate(pairwise(segments))
        for begin in range(low, high, EXPAND["BN"])
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)

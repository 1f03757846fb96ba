"""Causal attention of rows laid end to end: no token sees another row's.

It is registered with transformers as an attention implementation, so that every family whose
attention goes through transformers' interface works unchanged, its grouped heads and its sliding
window included. What it needs to know of the rows comes as keyword arguments of the model's call.

On CUDA from sm_80 on, in 16 bits: FlashAttention over the bounds of the rows (`torch.nn.attention.varlen`).
Elsewhere: rows are spread out to one batch, padded on the right, and go through SDPA; what stands
behind a row is hidden from it by causality, and dropped when the rows are laid end to end again.

Legend: M tokens end to end, B rows, T tokens of the longest, H heads, D their width.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

NAME = "loratune_packed"


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention over bounds runs: on CUDA from sm_80 on, in 16 bits."""
    return (
        device.type == "cuda"
        and dtype != torch.float32
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_bounds: Tensor | None = None,
    longest_row: int = 0,
    padded_index_M: Tensor | None = None,
    num_rows: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """1 x H x M x D each to 1 x M x H x D, in transformers' signature.

    Args:
        module: the attention layer; not used.
        query, key, value: key and value may have fewer heads.
        attention_mask: None: the rows say what may be seen.
        scaling: what multiplies the scores; None: 1 / sqrt(D).
        sliding_window: how many tokens back, itself counted, a token sees; None: the whole row.
        row_bounds: int32[B + 1], for FlashAttention.
        longest_row: T.
        padded_index_M: a token's place in the B x T batch, for SDPA.
        num_rows: B.
    """
    assert attention_mask is None
    if padded_index_M is None:
        assert row_bounds is not None
        attended = _varlen(query, key, value, row_bounds, longest_row, scaling, sliding_window)
    else:
        attended = _padded(
            query, key, value, padded_index_M, num_rows, longest_row, scaling, sliding_window
        )
    return attended.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_bounds: Tensor,
    longest_row: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _knows_groups():
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = (heads.repeat_interleave(repeats, dim=1) for heads in (k, v))
    # A token and the `sliding_window` - 1 before it; nothing after it.
    back = -1 if sliding_window is None else sliding_window - 1
    return varlen_attn(
        q,
        k,
        v,
        row_bounds,
        row_bounds,
        longest_row,
        longest_row,
        scale=scaling,
        window_size=(back, 0),
        **options,
    )


@cache
def _knows_groups() -> bool:
    """Whether the installed torch has grouped heads in varlen_attn (from 2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padded_index_M: Tensor,
    num_rows: int,
    longest_row: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    def spread(heads: Tensor) -> Tensor:
        _, num_heads, _, width = heads.shape
        flat = heads.new_zeros(num_rows * longest_row, num_heads, width)
        flat = flat.index_copy(0, padded_index_M, heads[0].transpose(0, 1))
        return flat.view(num_rows, longest_row, num_heads, width).transpose(1, 2)

    window: Tensor | None = None
    if sliding_window is not None and sliding_window < longest_row:
        at = torch.arange(longest_row, device=query.device)
        behind = at[:, None] - at[None, :]
        window = (behind >= 0) & (behind < sliding_window)
    attended = functional.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        attn_mask=window,
        is_causal=window is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, padded_index_M)

"""Causal attention of rows laid end to end: no token sees another row's.

It is registered with transformers as an attention implementation, so that every family whose
attention goes through transformers' interface works unchanged, its grouped heads and its sliding
window included. What it needs to know of the rows comes as keyword arguments of the model's call.

On CUDA: kernels of our own over the bounds of the rows (`engine.attention_kernels`). Elsewhere:
rows are spread out to one batch, padded on the right, and go through SDPA; what stands behind a row
is hidden from it by causality, and dropped when the rows are laid end to end again.

Legend: M tokens end to end, B rows, T tokens of the longest, H heads, G key heads, D their width.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from loratune.errors import ModelError

NAME = "loratune_packed"
# What models hand to their attention that does not change it: where tokens are and what is kept is
# said otherwise here, and a base with dropout of its own is refused.
HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def has_row_attention(device: torch.device) -> bool:
    """Whether attention goes by the bounds of the rows, without padding: on CUDA."""
    return device.type == "cuda"


def where_rows_lie(row_bounds: Tensor, *, num_tokens: int, longest_row: int) -> dict[str, Any]:
    """The keyword arguments of a model's call that tell `packed_attention` of its rows.

    Args:
        row_bounds: int32[B + 1] on the model's device, from 0 to `num_tokens`.
        num_tokens: M.
        longest_row: no row of any step is longer.
    """
    if has_row_attention(row_bounds.device):
        return {"row_bounds": row_bounds, "longest_row": longest_row}
    counts = row_bounds.diff()
    longest = int(counts.max())
    row_of = torch.repeat_interleave(counts)
    starts_M = row_bounds[:-1].long()[row_of]
    within = torch.arange(num_tokens, device=row_bounds.device) - starts_M
    return {
        "longest_row": longest,
        "padded_index_M": row_of * longest + within,
        "num_rows": len(counts),
    }


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
    **more: Any,
) -> tuple[Tensor, None]:
    """1 x H x M x D each to 1 x M x H x D, in transformers' signature.

    Args:
        module: the attention layer; not used.
        query, key, value: key and value may have fewer heads.
        attention_mask: None: the rows say what may be seen.
        scaling: what multiplies the scores; None: 1 / sqrt(D).
        sliding_window: how many tokens back, itself counted, a token sees; None: the whole row.
        row_bounds: int32[B + 1], for the kernels.
        longest_row: T.
        padded_index_M: a token's place in the B x T batch, for SDPA.
        num_rows: B.

    Raises:
        ModelError: the family asks for more, such as a soft cap on the scores or sinks.
    """
    assert attention_mask is None
    strange = [name for name, value in more.items() if value is not None and name not in HARMLESS]
    if strange:
        raise ModelError(
            f"{type(module).__name__} wants an attention with {', '.join(strange)}, which packing "
            "does not do; use --engine reference"
        )
    if padded_index_M is None:
        assert row_bounds is not None
        q_MHD, k_MGD, v_MGD = (heads[0].transpose(0, 1) for heads in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended, _ = row_attention(
            q_MHD, k_MGD, v_MGD, row_bounds, longest_row, scale, sliding_window
        )
    else:
        attended = _padded(
            query, key, value, padded_index_M, num_rows, longest_row, scaling, sliding_window
        )
    return attended.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)


@torch.library.custom_op("loratune::row_attention", mutates_args=())
def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_bounds: Tensor,
    longest_row: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """o, M x H x D, and for the backward float32[H, M]; see `attention_kernels.attention_forward`.

    Args:
        q: M x H x D.
        k, v: M x G x D.
        row_bounds: int32[B + 1], ascending; rows may be empty.
        longest_row: no row has more tokens.
        scale: what multiplies the scores.
        window: how many tokens back, itself counted, a token sees; None: the whole row.
    """
    from loratune.engine.attention_kernels import attention_forward  # Triton is there with CUDA.

    return attention_forward(
        _dense(q),
        _dense(k),
        _dense(v),
        row_bounds,
        longest_row=longest_row,
        scale=scale,
        window=window,
    )


@row_attention.register_fake
def _(  # pyright: ignore[reportUnusedFunction]  # registered by its decorator
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_bounds: Tensor,
    longest_row: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("loratune::row_attention_backward", mutates_args=())
def row_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    row_bounds: Tensor,
    longest_row: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous."""
    from loratune.engine.attention_kernels import attention_backward

    return attention_backward(
        _dense(grad_o),
        _dense(q),
        _dense(k),
        _dense(v),
        o.contiguous(),
        lse.contiguous(),
        row_bounds,
        longest_row=longest_row,
        scale=scale,
        window=window,
    )


@row_attention_backward.register_fake
def _(  # pyright: ignore[reportUnusedFunction]  # registered by its decorator
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    row_bounds: Tensor,
    longest_row: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, row_bounds, ctx.longest_row, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, row_bounds)


def _backward(ctx: Any, grad_o: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    assert grad_o is not None
    grads = row_attention_backward(
        grad_o, *ctx.saved_tensors, ctx.longest_row, ctx.scale, ctx.window
    )
    return *grads, None, None, None, None


row_attention.register_autograd(_backward, setup_context=_setup)


def _dense(heads: Tensor) -> Tensor:
    """The kernels take any strides but that of a head's features."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


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

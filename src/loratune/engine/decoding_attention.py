"""Attention over a cache of keys and values in fixed slots: whole prompts, then token by token.

Each row has a slot of the cache for as long as it is answered, with room for its prompt and its
answer. A prompt's tokens attend to each other as in training (`engine.attention`) and leave their
keys and values in the slot; afterwards each row has one new token a step, which attends to all that
is in its slot. Layers with a sliding window keep what has left it, and do not look there.

It is registered with transformers as an attention implementation, as the one for training is. The
cache hangs on the attention layers themselves.

On CUDA: kernels of our own (`engine.decoding_kernels`). Elsewhere: SDPA over the slots in use, cut
at the longest, with a mask.

Legend: M tokens of the step, S slots, L room of a slot in tokens, H heads, G key heads, D width of
a key, E width of a value.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from loratune.engine.attention import has_row_attention, packed_attention

NAME = "loratune_decoding"


class LayerCache(NamedTuple):
    """One layer's keys, S x G x L x D, and values, S x G x L x E."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class CacheShape:
    """An attention layer, and what one token leaves in its cache."""

    layer: nn.Module
    num_key_heads: int
    key_width: int
    value_width: int

    def bytes_per_token(self, element_size: int) -> int:
        """Bytes that a token takes in this layer's cache."""
        return self.num_key_heads * (self.key_width + self.value_width) * element_size

    def allocate(
        self, *, num_slots: int, room: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """An empty cache: zeros, because what a mask hides is multiplied all the same."""
        keys, values = (
            torch.zeros(num_slots, self.num_key_heads, room, width, dtype=dtype, device=device)
            for width in (self.key_width, self.value_width)
        )
        return LayerCache(keys, values)


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slot_M: Tensor | None = None,
    position_M: Tensor | None = None,
    is_prompt: bool = True,
    noted: list[CacheShape] | None = None,
    **where: Any,
) -> tuple[Tensor, None]:
    """1 x H x M x D each to 1 x M x H x E, in transformers' signature.

    Args:
        module: the attention layer; what `cache_on` gave it is used.
        query, key, value: key and value may have fewer heads.
        attention_mask: None: the slots say what may be seen.
        scaling: what multiplies the scores; None: 1 / sqrt(D).
        sliding_window: how many tokens back, itself counted, a token sees; None: all.
        slot_M: int64, the slot of each token; None: nothing is kept, as for a row without answer.
        position_M: int64, where in its slot each token stands.
        is_prompt: the tokens are whole rows end to end, of which `where` tells; otherwise one new
            token of each of M rows.
        noted: takes down the layers that are called, in their order.
    """
    assert attention_mask is None
    if noted is not None:
        noted.append(CacheShape(module, key.shape[1], key.shape[-1], value.shape[-1]))
    if slot_M is not None:
        assert position_M is not None
        cache = cache_of(module)
        store(key[0].transpose(0, 1), value[0].transpose(0, 1), cache, slot_M, position_M)
        if not is_prompt:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            q_MHD = query[0].transpose(0, 1)
            attended = attend(q_MHD, cache, slot_M, position_M, scale=scale, window=sliding_window)
            return attended.unsqueeze(0), None
    return packed_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        sliding_window=sliding_window,
        **where,
    )


AttentionInterface.register(NAME, decoding_attention)


def cache_on(layers: Sequence[CacheShape], caches: Sequence[LayerCache]) -> None:
    """Hang each layer's cache on it."""
    for shape, cache in zip(layers, caches, strict=True):
        shape.layer.loratune_cache = cache  # pyright: ignore[reportArgumentType]  # no tensor or module


def cache_of(layer: nn.Module) -> LayerCache:
    """What `cache_on` hung on a layer."""
    cache: Any = layer.loratune_cache
    return cache


def store(
    key_MGD: Tensor, value_MGE: Tensor, cache: LayerCache, slot_M: Tensor, position_M: Tensor
) -> None:
    """Write each token's key and value to its place in its slot."""
    if has_row_attention(key_MGD.device):
        from loratune.engine.decoding_kernels import store_tokens  # Triton is there with CUDA.

        store_tokens(_dense(key_MGD), _dense(value_MGE), *cache, slot_M, position_M)
    else:
        cache.keys[slot_M, :, position_M] = key_MGD
        cache.values[slot_M, :, position_M] = value_MGE


def attend(
    q_MHD: Tensor,
    cache: LayerCache,
    slot_M: Tensor,
    position_M: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """M x H x E: what each token sees of its slot, itself and what stands before it."""
    if has_row_attention(q_MHD.device):
        from loratune.engine.decoding_kernels import attend_to_slots

        return attend_to_slots(
            _dense(q_MHD), *cache, slot_M, position_M, scale=scale, window=window
        )
    longest = int(position_M.max()) + 1
    at_L = torch.arange(longest)
    seen_ML = at_L <= position_M[:, None]
    if window is not None:
        seen_ML &= at_L > position_M[:, None] - window
    # A NaN that whoever had the slot before left there would go through the mask: 0 x NaN is NaN.
    hidden_M1L1 = ~seen_ML[:, None, :, None]
    seen = [one[:, :, :longest][slot_M].masked_fill_(hidden_M1L1, 0) for one in cache]
    attended = functional.scaled_dot_product_attention(
        q_MHD[:, :, None],
        *seen,
        attn_mask=seen_ML[:, None, None],
        scale=scale,
        enable_gqa=q_MHD.shape[1] != cache.keys.shape[1],
    )
    return attended[:, :, 0]


def _dense(heads: Tensor) -> Tensor:
    """The kernels take any strides but that of a head's features."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()

"""Attention over slots against a plain softmax in float64, on a CPU and by the kernels.

The kernels also run without a GPU in Triton's interpreter, where that is installed:
TRITON_INTERPRET=1 python -m pytest tests/engine/test_decoding_attention.py -m gpu
"""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.engine.decoding_attention import LayerCache, attend, store

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_CUDA = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"
)
# One key, a block of 64 and one more or less, several blocks.
LENGTHS = (1, 63, 64, 65, 130, 7, 16, 33)


def filled(
    *,
    num_heads: int = 6,
    num_key_heads: int = 2,
    width: int = 16,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, LayerCache, Tensor, Tensor]:
    """Queries of rows in scattered slots; what lies behind a row's end is NaN in none of them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    num_rows = len(LENGTHS)
    cache = LayerCache(
        random(num_rows + 3, num_key_heads, 144, width),
        random(num_rows + 3, num_key_heads, 144, value_width or width),
    )
    slot_M = torch.tensor([7, 0, 10, 3, 1, 9, 4, 5], device=device)
    # Queries as a model's fused product gives them: a view.
    q_MHD = random(num_rows, num_heads + 2, width)[:, :num_heads]
    return q_MHD, cache, slot_M, torch.tensor(LENGTHS, device=device) - 1


def plain(
    q_MHD: Tensor,
    cache: LayerCache,
    slot_M: Tensor,
    position_M: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """float64, row by row, head by head."""
    repeats = q_MHD.shape[1] // cache.keys.shape[1]
    rows = list[Tensor]()
    for q_HD, slot, position in zip(
        q_MHD.double(), slot_M.tolist(), position_M.tolist(), strict=True
    ):
        seen = slice(max(0, position + 1 - (window or position + 1)), position + 1)
        keys = cache.keys[slot, :, seen].double().repeat_interleave(repeats, dim=0)
        values = cache.values[slot, :, seen].double().repeat_interleave(repeats, dim=0)
        weights = (torch.einsum("hd,hnd->hn", q_HD, keys) * scale).softmax(-1)
        rows.append(torch.einsum("hn,hne->he", weights, values))
    return torch.stack(rows)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("window", [None, 1, 9, 70])
@pytest.mark.parametrize("num_key_heads", [1, 2, 6])
def test_each_row_attends_to_its_own_slot(num_key_heads: int, window: int | None):
    arguments = filled(num_key_heads=num_key_heads, value_width=8)
    found = attend(*arguments, scale=0.3, window=window)
    # float32: sums of at most 130 terms.
    assert error(found, plain(*arguments, scale=0.3, window=window)) < 2e-6


def test_what_a_row_does_not_see_is_nobodys_business():
    q_MHD, cache, slot_M, position_M = filled()
    clean = attend(q_MHD, cache, slot_M, position_M, scale=0.3, window=None)
    for slot, position in zip(slot_M.tolist(), position_M.tolist(), strict=True):
        for part in cache:
            part[slot, :, position + 1 :] = 1e4
    cache.keys[2] = cache.values[2] = math.nan  # a slot of nobody
    again = attend(q_MHD, cache, slot_M, position_M, scale=0.3, window=None)
    assert torch.equal(again, clean)


def stored(device: str, dtype: torch.dtype) -> tuple[LayerCache, LayerCache]:
    """A cache with tokens stored in it, and what it should hold."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    keys, values = random(5, 3, 20, 24), random(5, 3, 20, 8)
    found, wanted = LayerCache(keys.clone(), values.clone()), LayerCache(keys, values)
    slots, positions = [4, 0, 4, 2], [3, 0, 19, 7]
    key_MGD, value_MGE = random(4, 5, 24)[:, 1:4], random(4, 3, 8)
    for at, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        wanted.keys[slot, :, position] = key_MGD[at]
        wanted.values[slot, :, position] = value_MGE[at]
    store_in(found, key_MGD, value_MGE, slots, positions)
    return found, wanted


def store_in(
    cache: LayerCache, key_MGD: Tensor, value_MGE: Tensor, slots: list[int], positions: list[int]
) -> None:
    where = [torch.tensor(one, device=key_MGD.device) for one in (slots, positions)]
    if INTERPRETED:
        from loratune.engine.decoding_kernels import store_tokens

        store_tokens(key_MGD, value_MGE, *cache, *where)
    else:
        store(key_MGD, value_MGE, cache, where[0], where[1])


def test_tokens_are_stored_in_their_places_and_nowhere_else():
    found, wanted = stored("cpu", torch.float32)
    assert torch.equal(found.keys, wanted.keys)
    assert torch.equal(found.values, wanted.values)


# The kernels --------------------------------------------------------------------------------------


def by_kernels(
    q_MHD: Tensor, cache: LayerCache, slot_M: Tensor, position_M: Tensor, **how: Any
) -> Tensor:
    from loratune.engine.attention_kernels import Launch
    from loratune.engine.decoding_kernels import attend_to_slots

    if INTERPRETED:  # there is no device to ask for its shared memory
        how["launch"] = Launch(16, 32, 4, 1)
    return attend_to_slots(q_MHD, *cache, slot_M, position_M, scale=0.3, **how)


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("window", [None, 1, 9, 70])
@pytest.mark.parametrize("num_splits", [None, 1, 2, 16])
@pytest.mark.parametrize(("num_heads", "num_key_heads", "width"), [(9, 3, 64), (4, 4, 128)])
def test_kernels_attend_as_a_plain_softmax(
    num_heads: int, num_key_heads: int, width: int, num_splits: int | None, window: int | None
):
    arguments = filled(num_heads=num_heads, num_key_heads=num_key_heads, width=width, device=DEVICE)
    found = by_kernels(*arguments, num_splits=num_splits, window=window)
    wanted = plain(*arguments, scale=0.3, window=window)
    assert error(found, wanted) < 1e-5


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (80, 80), (256, 256), (96, 64)])
@pytest.mark.parametrize(
    ("dtype", "most"),
    # What rounds to 16 bits: softmax weights and outputs; q, k and v are exact.
    [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
def test_kernels_attend_in_every_precision_and_width(
    dtype: torch.dtype, most: float, width: int, value_width: int
):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    arguments = filled(width=width, value_width=value_width, dtype=dtype, device=DEVICE)
    for num_splits in (1, 4):
        found = by_kernels(*arguments, num_splits=num_splits, window=None)
        assert error(found, plain(*arguments, scale=0.3, window=None)) < most


@pytest.mark.gpu
@ON_CUDA
def test_kernels_do_not_read_what_a_row_does_not_see():
    q_MHD, cache, slot_M, position_M = filled(device=DEVICE)
    clean = by_kernels(q_MHD, cache, slot_M, position_M, window=None)
    for slot, position in zip(slot_M.tolist(), position_M.tolist(), strict=True):
        for part in cache:
            part[slot, :, position + 1 :] = math.nan
    cache.keys[2] = cache.values[2] = math.nan
    again = by_kernels(q_MHD, cache, slot_M, position_M, window=None)
    assert torch.equal(again, clean)


@pytest.mark.gpu
@ON_CUDA
def test_kernels_give_a_row_the_same_bits_whoever_its_neighbours_are():
    q_MHD, cache, slot_M, position_M = filled(device=DEVICE)
    whole = by_kernels(q_MHD, cache, slot_M, position_M, num_splits=2, window=None)
    for at in range(len(LENGTHS)):
        alone = by_kernels(
            q_MHD[at : at + 1],
            cache,
            slot_M[at : at + 1],
            position_M[at : at + 1],
            num_splits=2,
            window=None,
        )
        assert torch.equal(alone[0], whole[at])


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_store_tokens_in_their_places_and_nowhere_else(dtype: torch.dtype):
    found, wanted = stored(DEVICE, dtype)
    assert torch.equal(found.keys, wanted.keys)
    assert torch.equal(found.values, wanted.values)

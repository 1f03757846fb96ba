"""Attention of rows laid end to end, against a plain softmax of each row alone in float64."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.engine.attention import packed_attention, row_attention

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# One token, one more and one less than a block of 64, several blocks.
LENGTHS = (1, 40, 63, 64, 65, 7, 130)
SEEN = [None, 2, 9, 70]


def plain(
    q_MHD: Tensor,
    k_MGD: Tensor,
    v_MGD: Tensor,
    lengths: Sequence[int],
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """M x H x D, with scores in memory and keys repeated for their group."""
    repeats = q_MHD.shape[1] // k_MGD.shape[1]
    rows = list[Tensor]()
    for q, k, v in zip(
        *(heads.split(list(lengths)) for heads in (q_MHD, k_MGD, v_MGD)), strict=True
    ):
        k, v = (heads.repeat_interleave(repeats, dim=1) for heads in (k, v))
        scores_HTT = torch.einsum("mhd,nhd->hmn", q, k) * scale
        at = torch.arange(len(q), device=q.device)
        behind = at[:, None] - at[None, :]
        seen = (behind >= 0) & (behind < (window or len(q)))
        weights_HTT = scores_HTT.masked_fill(~seen, -math.inf).softmax(-1)
        rows.append(torch.einsum("hmn,nhd->mhd", weights_HTT, v))
    return torch.cat(rows)


def heads_of_one_product(
    lengths: Sequence[int],
    *,
    num_heads: int,
    num_key_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of M x (H + 2 G) D, as a model's fused product gives them."""
    generator = torch.Generator().manual_seed(0)
    features = (num_heads + 2 * num_key_heads) * width
    product = torch.randn(sum(lengths), features, generator=generator).to(device, dtype)
    q, k, v = product.split(
        [heads * width for heads in (num_heads, num_key_heads, num_key_heads)], 1
    )
    return (
        q.unflatten(1, (num_heads, width)),
        k.unflatten(1, (num_key_heads, width)),
        v.unflatten(1, (num_key_heads, width)),
    )


def bounds_of(lengths: Sequence[int], *, num_empty: int, device: str) -> Tensor:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds + bounds[-1:] * num_empty, dtype=torch.int32, device=device)


def padded(
    q_MHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, lengths: Sequence[int], *, window: int | None
) -> Tensor:
    """`packed_attention` as it is called off CUDA."""
    longest = max(lengths)
    index = [row * longest + at for row, length in enumerate(lengths) for at in range(length)]
    attended, _ = packed_attention(
        nn.Identity(),
        q_MHD.transpose(0, 1)[None],
        k_MGD.transpose(0, 1)[None],
        v_MGD.transpose(0, 1)[None],
        None,
        sliding_window=window,
        longest_row=longest,
        padded_index_M=torch.tensor(index),
        num_rows=len(lengths),
    )
    return attended[0]


def kernels(
    q_MHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, lengths: Sequence[int], *, window: int | None
) -> Tensor:
    """`packed_attention` as it is called on CUDA, with empty rows at the end."""
    attended, _ = packed_attention(
        nn.Identity(),
        q_MHD.transpose(0, 1)[None],
        k_MGD.transpose(0, 1)[None],
        v_MGD.transpose(0, 1)[None],
        None,
        sliding_window=window,
        longest_row=max(lengths),
        row_bounds=bounds_of(lengths, num_empty=3, device="cuda"),
    )
    return attended[0]


def with_gradients(
    attend: Any, heads: Sequence[Tensor], grad_o: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [one.detach().clone(memory_format=torch.preserve_format) for one in heads]
    for one in leaves:
        one.requires_grad_()
    output = attend(*leaves, *args, **kwargs)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_o)]


def drawn_like(heads: Tensor, *, seed: int = 1) -> Tensor:
    drawn = torch.randn(heads.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(heads.device, heads.dtype)


def largest_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Relative to the largest number of each tensor."""
    return [
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
    ]


def check(
    attend: Any, heads: Sequence[Tensor], lengths: Sequence[int], window: int | None, *, most: float
) -> None:
    grad_o = drawn_like(heads[0])
    found = with_gradients(attend, heads, grad_o, lengths, window=window)
    exact = [one.double() for one in heads]
    scale = heads[0].shape[-1] ** -0.5
    expected = with_gradients(plain, exact, grad_o.double(), lengths, window=window, scale=scale)
    assert max(largest_errors(found, expected)) < most


@pytest.mark.parametrize("window", SEEN)
def test_padded_rows_attend_as_each_row_alone(window: int | None):
    heads = heads_of_one_product(LENGTHS, num_heads=6, num_key_heads=2, width=16)
    # float32: sums of at most 130 terms.
    check(padded, heads, LENGTHS, window, most=2e-6)


def neighbours_stay_clean(attend: Any, heads: Sequence[Tensor], lengths: Sequence[int]) -> None:
    grad_o = drawn_like(heads[0])
    clean = with_gradients(attend, heads, grad_o, lengths, window=None)
    begin = sum(lengths[:3])
    bad = slice(begin, begin + lengths[3])
    for one in heads:
        one[bad] = math.nan
    grad_o[bad] = math.nan
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[bad] = False
    dirty = with_gradients(attend, heads, grad_o, lengths, window=None)
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[others], after[others])
        assert after[bad].isnan().all()


def test_nan_in_one_padded_row_leaves_its_neighbours_untouched():
    heads = heads_of_one_product(LENGTHS, num_heads=4, num_key_heads=2, width=16)
    neighbours_stay_clean(padded, heads, LENGTHS)


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("window", SEEN)
@pytest.mark.parametrize("width", [8, 64, 80, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "most"),
    # What rounds to 16 bits: q, k, v and grad_o are exact, softmax weights, outputs are not.
    [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
def test_kernels_attend_as_each_row_alone(
    dtype: torch.dtype, most: float, width: int, window: int | None
):
    for lengths in (LENGTHS, (17, 128, 3), (64, 5)):
        heads = heads_of_one_product(
            lengths, num_heads=6, num_key_heads=2, width=width, dtype=dtype, device="cuda"
        )
        check(kernels, heads, lengths, window, most=most)


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("longest", [65, 130, 2100])
def test_kernels_attend_to_one_head_and_to_long_rows(longest: int):
    lengths = (longest, 5, longest - 64)
    heads = heads_of_one_product(
        lengths, num_heads=2, num_key_heads=2, width=64, dtype=torch.bfloat16, device="cuda"
    )
    check(kernels, heads, lengths, None, most=2e-2)


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("lengths", [LENGTHS, (40, 9, 33, 64, 50)])
def test_nan_in_one_row_of_the_kernels_leaves_its_neighbours_untouched(lengths: tuple[int, ...]):
    heads = heads_of_one_product(
        lengths, num_heads=6, num_key_heads=2, width=64, dtype=torch.bfloat16, device="cuda"
    )
    neighbours_stay_clean(kernels, heads, lengths)


@pytest.mark.gpu
@ON_CUDA
def test_kernels_give_the_same_bits_at_every_repeat_and_wherever_a_row_lies():
    lengths = (130, 64, 130)
    heads = heads_of_one_product(
        lengths, num_heads=6, num_key_heads=2, width=64, dtype=torch.bfloat16, device="cuda"
    )
    grad_o = drawn_like(heads[0])
    for one in (*heads, grad_o):
        one[-130:] = one[:130]
    first = with_gradients(kernels, heads, grad_o, lengths, window=None)
    for one in first:
        assert torch.equal(one[:130], one[-130:])
    for _ in range(5):
        again = with_gradients(kernels, heads, grad_o, lengths, window=None)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@ON_CUDA
def test_the_operator_keeps_the_rules_of_pytorch_and_compiles_whole():
    heads = heads_of_one_product(
        LENGTHS, num_heads=6, num_key_heads=2, width=64, dtype=torch.bfloat16, device="cuda"
    )
    bounds = bounds_of(LENGTHS, num_empty=2, device="cuda")
    leaves = [one.detach().clone().requires_grad_() for one in heads]
    torch.library.opcheck(row_attention, (*leaves, bounds, max(LENGTHS), 0.125, None))
    grad_o = drawn_like(heads[0])
    compiled = torch.compile(kernels, fullgraph=True)
    ours = with_gradients(compiled, heads, grad_o, LENGTHS, window=None)
    eager = with_gradients(kernels, heads, grad_o, LENGTHS, window=None)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))

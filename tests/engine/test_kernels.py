"""The Triton kernels against plain sums over tokens in float64.

They need a CUDA device, or Triton's interpreter: see `devices`.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from loratune.engine.grouped import GroupedProducts
from loratune.engine.routing import TOKENS_SUMMED_AT_ONCE, Routing, route
from torch_devices import INTERPRETED, KERNEL_DEVICE, ON_KERNELS

DEVICE = KERNEL_DEVICE
pytestmark = ON_KERNELS
# Tokens of each slot: none (first, in the middle, last), one, less and more than a tile, more than
# a chunk; filler behind them.
COUNTS = (0, 5, 70, 0, 1, TOKENS_SUMMED_AT_ONCE + 65, 0)
FILLER = 77
NUM_TOKENS = sum(COUNTS) + FILLER
# Largest error over the largest number: sums in float32 of exact operands; one rounding to 16 bits,
# which the interpreter cuts off.
CLOSE = {
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3 if INTERPRETED else 4e-3,
    torch.float16: 5e-4,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def products() -> GroupedProducts:
    from loratune.engine.kernels import TritonProducts

    return TritonProducts()


def routing(*, fresh: Sequence[int] = ()) -> Routing:
    whole, lengths = route(
        COUNTS,
        fresh=[slot in fresh for slot in range(len(COUNTS))],
        num_tokens=NUM_TOKENS,
        fixed_size=True,
    )
    return Routing.of(torch.from_numpy(whole).to(DEVICE), lengths)


def spans() -> list[tuple[int, slice]]:
    """Each slot's tokens."""
    begins = [sum(COUNTS[:slot]) for slot in range(len(COUNTS))]
    return [(slot, slice(at, at + COUNTS[slot])) for slot, at in enumerate(begins)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def factors(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A factor for each slot, NaN in those without tokens."""
    factor = draw(len(COUNTS), *shape, seed=seed, dtype=dtype)
    factor[[slot for slot, count in enumerate(COUNTS) if count == 0]] = float("nan")
    return factor


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def expanded(hs: Sequence[Tensor], ws: Sequence[Tensor], segments: Sequence[int]) -> Tensor:
    """float64[M, N]: each token's own slot's sum of H W, member by member."""
    rank = ws[0].shape[1]
    y_MN = torch.zeros(NUM_TOKENS, segments[-1], dtype=torch.float64, device=DEVICE)
    for slot, tokens in spans():
        for member, (low, high) in enumerate(pairwise(segments)):
            ranks = slice(member * rank, (member + 1) * rank)
            for h, w in zip(hs, ws, strict=True):
                if COUNTS[slot]:
                    part = h[tokens, ranks].double() @ w[slot, :, low:high].double()
                    y_MN[tokens, low:high] += part
    return y_MN


@pytest.mark.parametrize("width", [72, 203])
@pytest.mark.parametrize("rank", [8, 24])
@pytest.mark.parametrize("num_factors", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_takes_each_token_through_its_own_slots_factor(dtype, num_factors, rank, width):
    x_MN = draw(NUM_TOKENS, width, seed=0, dtype=dtype)
    # What filler holds is nobody's.
    x_MN[-FILLER:] = float("nan")
    ws = [factors(rank, width, seed=1 + i, dtype=dtype) for i in range(num_factors)]
    # Parts of wider matrices, as a group's members are.
    wide = [torch.full((NUM_TOKENS, rank + 16), 7.0, device=DEVICE, dtype=dtype) for _ in ws]
    products().shrink(x_MN, ws, routing(), into=[one[:, 8:-8] for one in wide])
    for w_AKN, h in zip(ws, wide, strict=True):
        wanted = torch.zeros(NUM_TOKENS, rank, dtype=torch.float64, device=DEVICE)
        for slot, tokens in spans():
            if COUNTS[slot]:
                wanted[tokens] = x_MN[tokens].double() @ w_AKN[slot].double().T
        assert error(h[:, 8:-8], wanted) < CLOSE[dtype]
        assert not h[-FILLER:, 8:-8].any()
        assert bool((h[:, :8] == 7).all())
        assert bool((h[:, -8:] == 7).all())


@pytest.mark.parametrize("width", [72, 203])
@pytest.mark.parametrize("rank", [8, 72])
@pytest.mark.parametrize(("num_factors", "is_scaled"), [(1, False), (2, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_overwrites_fresh_slots_adds_to_others_and_keeps_those_without_tokens(
    dtype, num_factors, is_scaled, rank, width
):
    hs = [draw(NUM_TOKENS, rank, seed=i, dtype=dtype) for i in range(num_factors)]
    x_MN = draw(NUM_TOKENS, width, seed=4, dtype=dtype)
    for one in (*hs, x_MN):
        one[-FILLER:] = float("nan")
    scale_A = draw(len(COUNTS), seed=7) if is_scaled else None
    before = draw(len(COUNTS), rank, width, seed=6)
    into = torch.empty_like(before)

    def run() -> None:
        into.copy_(before)
        # Fresh with a NaN of a trial that diverged, of one chunk and of several; fresh, no tokens.
        into[[2, 5]] = float("nan")
        products().outer(hs, x_MN, routing(fresh=(2, 3, 5)), into_AKN=into, scale_A=scale_A)

    run()
    for slot, tokens in spans():
        # Two factors are summed in float32 and rounded to the operands' precision once.
        h_MK = torch.stack([one[tokens].float() for one in hs]).sum(dim=0).to(dtype)
        wanted = h_MK.double().T @ x_MN[tokens].double()
        wanted *= 1.0 if scale_A is None else float(scale_A[slot])
        if slot not in (2, 5):
            wanted += before[slot].double()
        if not COUNTS[slot]:
            assert torch.equal(into[slot], before[slot]), slot
        # Beside float32's sums, that rounding: the interpreter cuts it off.
        assert error(into[slot], wanted) < (CLOSE[dtype] if num_factors == 2 else 4e-6), slot
    first = into.clone()
    run()
    assert torch.equal(into, first), "the same bits at every repeat"


@pytest.mark.parametrize("segments", [(0, 200), (0, 136, 200), (0, 136, 160, 203)])
@pytest.mark.parametrize("num_factors", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_takes_every_member_through_its_own_columns(dtype, num_factors, segments):
    rank, width, members = 8, segments[-1], len(segments) - 1
    hs = [draw(NUM_TOKENS, members * rank, seed=i, dtype=dtype) for i in range(num_factors)]
    ws = [factors(rank, width, seed=5 + i, dtype=dtype) for i in range(num_factors)]
    bias_N = draw(width, seed=9, dtype=dtype)
    wide = torch.full((NUM_TOKENS, width + 16), 7.0, device=DEVICE, dtype=dtype)
    products().expand(
        hs, ws, routing(), into_MN=wide[:, 8:-8], bias_N=bias_N, segments=list(segments)
    )
    assert error(wide[:, 8:-8], expanded(hs, ws, segments) + bias_N.double()) < CLOSE[dtype]
    assert bool((wide[:, :8] == 7).all())
    assert bool((wide[:, -8:] == 7).all())


def gains(width: int) -> tuple[Tensor, Tensor]:
    """gain and 1 / norm; slots 4 and 0 train no magnitudes, others have gains of both signs."""
    gain_AN, inverse_norm_AN = draw(len(COUNTS), width, seed=21), draw(len(COUNTS), width, seed=22)
    gain_AN = gain_AN.sign() * (gain_AN.abs() + 0.1)
    for slot in (0, 4):
        gain_AN[slot], inverse_norm_AN[slot] = 1, 0
    return gain_AN, inverse_norm_AN.abs() + (inverse_norm_AN != 0) * 0.1


def of_tokens(gain_AN: Tensor) -> Tensor:
    """float64[M, N]: each token's own slot's gain, one for filler."""
    gain_MN = torch.ones(NUM_TOKENS, gain_AN.shape[1], dtype=torch.float64, device=DEVICE)
    for slot, tokens in spans():
        gain_MN[tokens] = gain_AN[slot].double()
    return gain_MN


@pytest.mark.parametrize("segments", [(0, 72), (0, 136, 160, 203)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_expand_rescaled_adds_to_the_base_and_applies_each_slots_gain(dtype, biased, segments):
    rank, width, members = 16, segments[-1], len(segments) - 1
    hs = [draw(NUM_TOKENS, members * rank, seed=i, dtype=dtype) for i in range(2)]
    ws = [factors(rank, width, seed=5 + i, dtype=dtype) for i in range(2)]
    base_MN, bias_N = (
        draw(NUM_TOKENS, width, seed=8, dtype=dtype),
        draw(width, seed=9, dtype=dtype),
    )
    gain_AN, _ = gains(width)
    y_MN, kept_MN = base_MN.clone(), torch.empty_like(base_MN)
    products().expand_rescaled(
        hs,
        ws,
        routing(),
        onto_MN=y_MN,
        gain_AN=gain_AN,
        bias_N=bias_N if biased else None,
        kept_MN=kept_MN if biased else None,
        segments=list(segments),
    )
    before_MN = base_MN.double() + expanded(hs, ws, segments)
    wanted_MN = before_MN * of_tokens(gain_AN) + biased * bias_N.double()
    assert error(y_MN, wanted_MN) < CLOSE[dtype]
    if biased:
        assert error(kept_MN, before_MN) < CLOSE[dtype]


@pytest.mark.parametrize("widths", [(72,), (136, 24, 43)])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rescale_gradient_is_the_backward_of_the_gain(dtype, is_scaled, widths):
    width = sum(widths)
    grads = [draw(NUM_TOKENS, one, seed=i, dtype=dtype) for i, one in enumerate(widths)]
    grad_MN = torch.cat(grads, dim=1)
    gain_AN, inverse_norm_AN = gains(width)
    gain_AN[5, 3] = 0
    y_MN = draw(NUM_TOKENS, width, seed=7, dtype=dtype)
    # What slots without magnitudes and filler put out is nobody's.
    y_MN[spans()[4][1]] = float("nan")
    y_MN[-FILLER:] = float("nan")
    before = draw(len(COUNTS), width, seed=8)
    into_AN, found = before.clone(), torch.full_like(grad_MN, float("nan"))
    # Fresh with a NaN of a trial that diverged; fresh without tokens.
    into_AN[2] = float("nan")

    def run() -> None:
        products().rescale_gradient(
            grads,
            y_MN,
            routing(fresh=(2, 3)),
            gain_AN=gain_AN,
            inverse_norm_AN=inverse_norm_AN,
            is_scaled=is_scaled,
            into_MN=found,
            into_AN=into_AN,
        )

    run()
    assert error(found, grad_MN.double() * of_tokens(gain_AN)) < CLOSE[dtype]
    wanted_AN = before.double()
    wanted_AN[2] = 0
    for slot, tokens in spans():
        if slot == 4:
            continue
        sum_N = (grad_MN[tokens].double() * y_MN[tokens].double()).sum(dim=0)
        if is_scaled:
            sum_N = torch.where(gain_AN[slot] != 0, sum_N / gain_AN[slot].double(), 0.0)
        wanted_AN[slot] += sum_N * inverse_norm_AN[slot].double()
    assert error(into_AN, wanted_AN) < CLOSE[torch.float32]
    first = into_AN.clone()
    into_AN.copy_(before)
    run()
    assert torch.equal(into_AN, first), "the same bits at every repeat"

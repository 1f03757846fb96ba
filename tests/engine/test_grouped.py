"""The looped products, and the layer made of them, against a loop over tokens in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from loratune.engine.grouped import LoopedProducts
from loratune.engine.packed_linear import packed_linear, packed_linear_backward
from loratune.engine.routing import Routing, route

# Tokens of each slot: an empty slot first, in the middle and last; filler behind them.
COUNTS = (0, 5, 17, 0, 1, 0)
NUM_TOKENS = 30
RANK, WIDTH = 3, 7
SLOTS = [1] * 5 + [2] * 17 + [4] + [-1] * 7
PRODUCTS = LoopedProducts()
# float32 against float64, sums of at most 20 products of numbers near 1.
CLOSE = 1e-5


def routing(*, fresh: Sequence[int] = (), fixed_size: bool = False) -> Routing:
    whole, lengths = route(
        COUNTS,
        fresh=[slot in fresh for slot in range(len(COUNTS))],
        num_tokens=NUM_TOKENS,
        fixed_size=fixed_size,
    )
    return Routing.of(torch.from_numpy(whole), lengths)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_with_nan_where_nobody_may_look(*shape: int, seed: int) -> Tensor:
    """A factor for each slot, NaN in those without tokens."""
    factor = draw(*shape, seed=seed)
    factor[[0, 3, 5]] = float("nan")
    return factor


@pytest.mark.parametrize("num_factors", [1, 2])
@pytest.mark.parametrize("fixed_size", [False, True])
def test_shrink_takes_each_token_through_its_own_slots_factor(num_factors, fixed_size):
    x_MN = draw(NUM_TOKENS, WIDTH, seed=0)
    ws = [
        drawn_with_nan_where_nobody_may_look(6, RANK, WIDTH, seed=1 + i) for i in range(num_factors)
    ]
    # Parts of wider matrices, as a group's members are.
    wide = [torch.full((NUM_TOKENS, 8), 9.0) for _ in ws]
    PRODUCTS.shrink(x_MN, ws, routing(fixed_size=fixed_size), into=[one[:, 2:5] for one in wide])
    for w_AKN, h in zip(ws, wide, strict=True):
        for token, slot in enumerate(SLOTS):
            expected = w_AKN[slot].double() @ x_MN[token].double() if slot >= 0 else torch.zeros(3)
            assert torch.allclose(h[token, 2:5].double(), expected.double(), rtol=CLOSE, atol=CLOSE)
        assert bool((h[:, [0, 1, 5, 6, 7]] == 9).all()), "nothing beside it is written to"


@pytest.mark.parametrize("num_factors", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_expand_sums_the_factors_and_the_bias(num_factors, bias):
    hs = [draw(NUM_TOKENS, RANK, seed=i) for i in range(num_factors)]
    ws = [
        drawn_with_nan_where_nobody_may_look(6, RANK, WIDTH, seed=5 + i) for i in range(num_factors)
    ]
    bias_N = draw(WIDTH, seed=9) if bias else None
    wide = torch.full((NUM_TOKENS, 10), float("nan"))
    PRODUCTS.expand(hs, ws, routing(), into_MN=wide[:, 1:8], bias_N=bias_N)
    for token, slot in enumerate(SLOTS):
        expected = torch.zeros(WIDTH, dtype=torch.float64)
        if slot >= 0:
            for h_MK, w_AKN in zip(hs, ws, strict=True):
                expected += h_MK[token].double() @ w_AKN[slot].double()
        if bias_N is not None:
            expected += bias_N.double()
        assert torch.allclose(wide[token, 1:8].double(), expected, rtol=CLOSE, atol=CLOSE)
    assert bool(wide[:, [0, 8, 9]].isnan().all())


@pytest.mark.parametrize("num_factors", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_outer_overwrites_fresh_slots_adds_to_others_and_keeps_those_without_tokens(
    num_factors, scaled
):
    hs = [draw(NUM_TOKENS, RANK, seed=i) for i in range(num_factors)]
    x_MN = draw(NUM_TOKENS, WIDTH, seed=4)
    # What filler holds is nobody's.
    x_MN[23:] = float("nan")
    scale_A = torch.tensor([1.0, 0.5, 3.0, 7.0, -2.0, 1.0]) if scaled else None
    before = draw(6, RANK, WIDTH, seed=6)
    into = before.clone()
    # Fresh, but with a NaN left over from a trial that diverged; and fresh without tokens.
    into[1] = float("nan")
    PRODUCTS.outer(hs, x_MN, routing(fresh=(1, 3)), into_AKN=into, scale_A=scale_A)
    for slot in range(6):
        tokens = [token for token, one in enumerate(SLOTS) if one == slot]
        expected = torch.zeros(RANK, WIDTH, dtype=torch.float64)
        for token in tokens:
            h_K = sum((h[token].double() for h in hs), start=torch.zeros(RANK))
            expected += torch.outer(h_K.double(), x_MN[token].double())
        expected *= 1.0 if scale_A is None else float(scale_A[slot])
        if slot != 1:
            expected += before[slot].double()
        assert torch.allclose(into[slot].double(), expected, rtol=CLOSE, atol=CLOSE), slot


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        h = torch.empty(NUM_TOKENS, RANK)
        PRODUCTS.shrink(
            draw(NUM_TOKENS, WIDTH, seed=0), [draw(6, RANK, WIDTH, seed=1)], routing(), into=[h]
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_group_of_layers_is_its_formula_and_its_gradients_are_autograds(
    corrected, gained, dropped, biased
):
    """Two members of widths 4 and 6; y = gain (W x' + ...) + W (x - x'), by tokens, in float64."""
    segments, out, scale_A = [0, 4, 10], 10, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    x, weight, bias = draw(NUM_TOKENS, WIDTH, seed=0), draw(out, WIDTH, seed=1), draw(out, seed=2)
    x_adapter = x * (draw(NUM_TOKENS, WIDTH, seed=3) > 0) * 1.5 if dropped else None
    a, a0 = draw(6, 2 * RANK, WIDTH, seed=4), draw(6, 2 * RANK, WIDTH, seed=5) * corrected
    b, b0 = draw(6, RANK, out, seed=6), draw(6, RANK, out, seed=7) * corrected
    gain = draw(6, out, seed=8).abs() if gained else None
    inverse_norm = draw(6, out, seed=9).abs() if gained else None
    scaled = scale_A[:, None, None]
    downs, ups = [a - a0], [scaled * b]
    if corrected:
        downs, ups = [a - a0, a0], [scaled * b, scaled * (b - b0)]
    routes = routing(fresh=(1, 2, 4)).tensors()
    y, h, correction, rescaled = packed_linear(
        x, x_adapter, [weight], None, bias if biased else None, downs, ups, gain, routes, segments
    )
    # y alone tells what the gain multiplied, or it is kept.
    is_scaled = gained and not biased and not dropped
    assert (rescaled.numel() > 0) == (gained and not is_scaled)

    live = {"x": x, "a": a, "b": b, "m": draw(6, out, seed=8).abs()}
    if x_adapter is not None:
        live["x'"] = x_adapter
    live = {name: one.double().requires_grad_(True) for name, one in live.items()}
    rows = list[Tensor]()
    for token, slot in enumerate(SLOTS):
        seen = live["x'"][token] if dropped else live["x"][token]
        base = weight.double() @ seen
        if slot >= 0:
            parts = []
            for member, (low, high) in enumerate([(0, 4), (4, 10)]):
                ranks = slice(member * RANK, (member + 1) * RANK)
                trained = live["b"][slot][:, low:high].T @ (live["a"][slot][ranks] @ seen)
                frozen = b0[slot][:, low:high].double().T @ (
                    a0[slot][ranks].double() @ live["x"][token]
                )
                parts.append(float(scale_A[slot]) * (trained - frozen))
            base = base + torch.cat(parts)
            if gain is not None and inverse_norm is not None:
                # m / norm, the norm a constant.
                base = base * live["m"][slot]
        row = base + bias.double() * biased
        if dropped:
            row = row + weight.double() @ (live["x"][token] - live["x'"][token])
        rows.append(row)
    expected = torch.stack(rows)
    assert torch.allclose(y.double(), expected.detach(), rtol=1e-4, atol=1e-4)

    grad_y = draw(NUM_TOKENS, out, seed=10)
    expected.backward(grad_y.double())
    grads = [torch.full_like(a, float("nan")), torch.full_like(b, float("nan"))]
    for one in grads:
        one[[0, 3, 5]] = 0
    grad_m = torch.zeros(6, out) if gained else None
    grad_x, grad_seen = packed_linear_backward(
        [part.contiguous() for part in grad_y.split([4, 6], dim=1)],
        x,
        x_adapter,
        h,
        correction,
        y if is_scaled else rescaled,
        [weight],
        None,
        downs,
        ups,
        scale_A,
        gain,
        inverse_norm,
        is_scaled,
        *grads,
        grad_m,
        routes,
        segments,
    )
    found = {"x": grad_x, "a": grads[0], "b": grads[1]}
    if dropped:
        found["x'"] = grad_seen
    if grad_m is not None and inverse_norm is not None:
        # The buffer's is dL/dm = dL/dgain / norm.
        found["m"] = grad_m / inverse_norm
    for name, gradient in found.items():
        wanted = live[name].grad
        assert wanted is not None, name
        error = (gradient.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5, name


def test_tokens_of_a_step_are_routed_as_this_file_says():
    assert routing().token_slot_M.tolist() == SLOTS
    assert np.bincount(np.array(SLOTS) + 1, minlength=7)[1:].tolist() == list(COUNTS)

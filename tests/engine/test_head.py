"""The head's losses and gradients against cross_entropy and autograd, by torch and the kernel."""

import pytest
import torch
from torch.nn import functional

from loratune.engine import head
from loratune.engine.head import Targets, head_losses
from loratune.planning import packing
from torch_devices import INTERPRETED, KERNEL_DEVICE, WAYS

NUM_TOKENS, WIDTH, VOCABULARY = 700, 16, 50


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "plain":
        return torch.device("cpu")
    if INTERPRETED:
        from loratune.engine.kernels import token_losses

        monkeypatch.setattr(head, "losses_and_gradients", token_losses)
    return KERNEL_DEVICE


def example(
    device: torch.device, *, bias: bool, vocabulary: int = VOCABULARY
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Targets]:
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    weight_VD = torch.randn(vocabulary, WIDTH, generator=generator)
    index_L = torch.randperm(NUM_TOKENS, generator=generator)[:600].sort().values
    targets = Targets(
        index_L=index_L.to(device),
        labels_L=torch.randint(vocabulary, (600,), generator=generator).to(device),
        slots_L=torch.zeros(600, dtype=torch.long, device=device),
        weights_L=torch.rand(600, generator=generator).to(device),
    )
    bias_V = torch.randn(vocabulary, generator=generator).to(device) if bias else None
    return hidden_MD.to(device), weight_VD.to(device), bias_V, targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5000])
def test_losses_and_gradients_are_those_of_cross_entropy_however_it_is_cut(
    monkeypatch, device, bias, chunk, vocabulary
):
    if chunk is not None:
        # 256 tokens at a time, the smallest cut that there is.
        monkeypatch.setattr(packing, "LOGITS_AT_ONCE", chunk)
    hidden_MD, weight_VD, bias_V, targets = example(device, bias=bias, vocabulary=vocabulary)
    before = hidden_MD.clone()
    losses_L, grad_MD = head_losses(hidden_MD, weight_VD, bias_V, targets, with_gradient=True)
    assert torch.equal(hidden_MD, before)

    live = hidden_MD.clone().requires_grad_(True)
    logits_LV = functional.linear(live[targets.index_L], weight_VD, bias_V)
    expected_L = functional.cross_entropy(logits_LV, targets.labels_L, reduction="none")
    (expected_L * targets.weights_L).sum().backward()
    # float32: some 1e-6 of numbers up to 20.
    assert torch.allclose(losses_L, expected_L.detach(), rtol=1e-5, atol=1e-5)
    assert grad_MD is not None
    assert live.grad is not None
    assert torch.allclose(grad_MD, live.grad, rtol=1e-5, atol=1e-5)
    without = torch.ones(NUM_TOKENS, dtype=torch.bool, device=device)
    without[targets.index_L] = False
    assert not grad_MD[without].any()


def test_validation_gives_the_same_losses_and_no_gradient(device):
    hidden_MD, weight_VD, bias_V, targets = example(device, bias=True)
    with_gradient, _ = head_losses(hidden_MD, weight_VD, bias_V, targets, with_gradient=True)
    without, grad_MD = head_losses(hidden_MD, weight_VD, bias_V, targets, with_gradient=False)
    assert torch.equal(with_gradient, without)
    assert grad_MD is None


def test_no_targets_are_no_losses(device):
    hidden_MD, weight_VD, bias_V, targets = example(device, bias=False)
    none = Targets(*(part[:0] for part in targets))
    losses_L, grad_MD = head_losses(hidden_MD, weight_VD, bias_V, none, with_gradient=True)
    assert losses_L.shape == (0,)
    assert grad_MD is not None
    assert not grad_MD.any()


def test_large_logits_do_not_overflow(device):
    hidden_MD, weight_VD, bias_V, targets = example(device, bias=False)
    losses_L, grad_MD = head_losses(hidden_MD * 1e4, weight_VD, bias_V, targets, with_gradient=True)
    assert grad_MD is not None
    assert bool(torch.isfinite(losses_L).all())
    assert bool(torch.isfinite(grad_MD).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_losses_are_those_of_the_rounded_logits(device, dtype):
    hidden_MD, weight_VD, _, targets = example(device, bias=False)
    hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
    losses_L, grad_MD = head_losses(hidden_MD, weight_VD, None, targets, with_gradient=True)
    logits_LV = functional.linear(hidden_MD[targets.index_L], weight_VD).double()
    logits_LV.requires_grad_(True)
    expected_L = functional.cross_entropy(logits_LV, targets.labels_L, reduction="none")
    (expected_L * targets.weights_L).sum().backward()
    # Softmax in float32 of the same numbers.
    assert torch.allclose(losses_L.double(), expected_L.detach(), rtol=1e-5, atol=1e-5)
    assert grad_MD is not None
    assert logits_LV.grad is not None
    wanted = logits_LV.grad @ weight_VD.double()
    # Gradients of logits are rounded to 8 or 11 bits, sums of 50 of them again.
    error = (grad_MD[targets.index_L].double() - wanted).abs().max() / wanted.abs().max()
    assert error < {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]

"""The low-rank products of decoding against each token alone in float64; kernels as on a CPU.

The kernels also run without a GPU in Triton's interpreter, where that is installed:
TRITON_INTERPRET=1 python -m pytest tests/engine/test_decoding_linear.py -m gpu
"""

import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from loratune.engine.decoding_linear import DecodingGroup
from loratune.engine.packed_linear import StepRouting
from loratune.engine.routing import Routing, route

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_CUDA = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"
)
SEGMENTS = [0, 150, 160, 193]
D = 600


class Drawn:
    """A group of three layers with biases, five seats of which one is empty, and tokens."""

    def __init__(
        self,
        *,
        counts: list[int],
        rank: int,
        filler: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        num_seats, num_tokens = len(counts), sum(counts) + filler
        self.x_MD = random(num_tokens, D)
        self.weight_ED, self.bias_E = random(193, D) / 10, random(193)
        self.down_AKD, self.up_ARE = (
            random(num_seats, 3 * rank, D) / 10,
            random(num_seats, rank, 193),
        )
        self.gain_AE = 1 + random(num_seats, 193).float() / 4
        self.seats = np.concatenate(
            [np.repeat(np.arange(num_seats), counts), np.full(filler, -1)]
        ).tolist()
        whole, lengths = route(
            counts, fresh=[False] * num_seats, num_tokens=num_tokens, fixed_size=filler > 0
        )
        self.step = StepRouting()
        routing = Routing.of(torch.from_numpy(whole).to(device), lengths)
        self.step.routing = routing.tensors()
        self.routing = routing

    def group(self, *, has_gain: bool) -> DecodingGroup:
        return DecodingGroup(
            weight_ED=self.weight_ED,
            bias_E=self.bias_E,
            segments=SEGMENTS,
            down_AKD=self.down_AKD,
            up_ARE=self.up_ARE,
            gain_AE=self.gain_AE if has_gain else None,
            step=self.step,
        )

    def adapters(self) -> Tensor:
        """float64 M x E: up (down x), token by token, layer by layer."""
        rank = self.up_ARE.shape[1]
        rows = list[Tensor]()
        for x_D, seat in zip(self.x_MD.double(), self.seats, strict=True):
            y_E = torch.zeros(193, dtype=torch.float64, device=x_D.device)
            for member in range(3 if seat >= 0 else 0):
                low, high = SEGMENTS[member : member + 2]
                down_RD = self.down_AKD[seat, member * rank : (member + 1) * rank].double()
                y_E[low:high] = self.up_ARE[seat, :, low:high].double().T @ (down_RD @ x_D)
            rows.append(y_E)
        return torch.stack(rows)

    def expected(self, *, has_gain: bool) -> Tensor:
        y_ME = self.x_MD.double() @ self.weight_ED.double().T + self.adapters()
        if has_gain:
            gain = [
                torch.ones_like(self.gain_AE[0]) if s < 0 else self.gain_AE[s] for s in self.seats
            ]
            y_ME = y_ME * torch.stack(gain)
        return y_ME + self.bias_E.double()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("has_gain", [False, True])
def test_every_token_goes_through_its_own_seats_factors(has_gain: bool):
    drawn = Drawn(counts=[3, 0, 1, 70, 2], rank=5, filler=4)
    found = torch.cat(drawn.group(has_gain=has_gain)(drawn.x_MD[None]), dim=-1)[0]
    # float32: sums of 600 terms.
    assert error(found, drawn.expected(has_gain=has_gain)) < 2e-6


def by_kernels(drawn: Drawn, num_splits: int | None) -> Tensor:
    from loratune.engine.decoding_kernels import adapter_outputs, output_blocks

    blocks = output_blocks(SEGMENTS, rank=drawn.up_ARE.shape[1], device=drawn.x_MD.device)
    return adapter_outputs(
        drawn.x_MD,
        drawn.down_AKD,
        drawn.up_ARE,
        drawn.routing,
        blocks=blocks,
        bias_E=drawn.bias_E,
        num_splits=num_splits,
    )


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("num_splits", [None, 1, 2, 8])
@pytest.mark.parametrize("rank", [1, 16, 70])
@pytest.mark.parametrize(
    ("dtype", "most"),
    # What rounds to 16 bits: down x, and the sum.
    [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)],
)
def test_kernels_multiply_as_each_token_alone(
    dtype: torch.dtype, most: float, rank: int, num_splits: int | None
):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    drawn = Drawn(counts=[3, 0, 1, 70, 2], rank=rank, filler=9, dtype=dtype, device=DEVICE)
    found = by_kernels(drawn, num_splits)
    assert error(found, drawn.adapters() + drawn.bias_E.double()) < most


@pytest.mark.gpu
@ON_CUDA
def test_nan_of_one_adapters_kernels_stays_with_its_tokens():
    drawn = Drawn(counts=[3, 2, 66], rank=4, filler=3, device=DEVICE)
    clean = by_kernels(drawn, 2)
    drawn.x_MD[3:5] = drawn.down_AKD[1] = drawn.up_ARE[1] = math.nan
    dirty = by_kernels(drawn, 2)
    others = [at for at in range(len(clean)) if at not in (3, 4)]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[3:5].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("has_gain", [False, True])
def test_a_group_on_cuda_gives_what_it_gives_on_a_cpu(has_gain: bool):
    drawn = Drawn(counts=[3, 0, 1, 70, 2], rank=5, filler=4, device="cuda")
    found = torch.cat(drawn.group(has_gain=has_gain)(drawn.x_MD[None]), dim=-1)[0]
    assert error(found, drawn.expected(has_gain=has_gain)) < 1e-5

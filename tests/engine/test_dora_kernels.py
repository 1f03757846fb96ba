"""DoRA's factors in one launch, against the norms of the moved weights in float64.

They need a CUDA device, or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

import os

import pytest
import torch

from loratune.engine.slots import GroupShape, Slots, lay_out, views

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rank", "width"),
    # Of one alignment and of another; ranks that fill a block and not.
    [(16, 96), (5, 50), (40, 64)],
)
def test_gains_are_those_of_the_moved_weights(dtype, rank, width):
    from loratune.engine.dora_kernels import GainKernel

    groups = (
        GroupShape(names=("q", "k"), in_features=width, out_features=(144, 30)),
        GroupShape(names=("down",), in_features=2 * width, out_features=(65,)),
    )
    generator = torch.Generator().manual_seed(0)
    layout = lay_out(groups, rank=rank, magnitudes=True)
    slots = Slots(layout, num_slots=5, dtype=dtype, device=DEVICE, corrected=False)
    slots.params_AP.copy_(torch.randn(slots.params_AP.shape, generator=generator))
    slots.scale_A.copy_(torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0]))
    slots.params_AP[2, 7] = float("nan")
    weights, square_norms = {}, {}
    for shape in groups:
        for name, out in zip(shape.names, shape.out_features, strict=True):
            weight = torch.randn(out, shape.in_features, generator=generator).to(DEVICE, dtype)
            weights[name] = weight
            square_norms[name] = weight.float().square().sum(dim=1)
    kernel = GainKernel(slots, weights, square_norms)
    kernel.refresh([3, 2, 0])
    assert slots.gain_AE is not None
    assert slots.inverse_norm_AE is not None
    for slot in (0, 3):
        for group, shape in enumerate(groups):
            part = views(slots.params_AP, layout, group)
            assert part.magnitude_AE is not None
            for member, name in enumerate(shape.names):
                low, high = shape.segments[member : member + 2]
                ranks = slice(member * rank, (member + 1) * rank)
                b_ER = part.up_ARE[slot, :, low:high].T.double()
                moved = weights[name].double() + slots.scale_A[slot].double() * (
                    b_ER @ part.down_AKD[slot, ranks].double()
                )
                norm_E = moved.norm(dim=1)
                first = layout.m_offsets[group] - layout.ends[1]
                outputs = slice(first + low, first + high)
                gain_E = part.magnitude_AE[slot, low:high].double() / norm_E
                # float32 throughout; squares of numbers that do not cancel.
                for found, wanted in (
                    (slots.inverse_norm_AE[slot, outputs], 1 / norm_E),
                    (slots.gain_AE[slot, outputs], gain_E),
                ):
                    error = (found.double() - wanted).abs().max() / wanted.abs().max()
                    assert error < 5e-6, (slot, name)
    # A NaN shows in its own slot, and slots that were not named keep what they had.
    assert bool(slots.gain_AE[2].isnan().any())
    assert bool((slots.gain_AE[[1, 4]] == 1).all())
    assert bool((slots.inverse_norm_AE[[1, 4]] == 0).all())

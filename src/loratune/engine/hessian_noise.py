"""The noise scale with the loss's curvature, by Hessian-vector products: for small models.

McCandlish et al. 2018 (arXiv 1812.06162, eq. 2.8 and 2.9) derive B_noise = tr(H S) / G'HG, and
B_simple is what it becomes where H is a multiple of the identity. It takes a Hessian-vector product
for every row, far too many for training; here it stands beside B_simple, to see how far apart they
are. Attention has to be computed by something that can be differentiated twice.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.errors import AnalysisError


@dataclass(frozen=True, slots=True)
class HessianNoise:
    """What `hessian_noise` found: both ratios, and the parts of each, unbiased.

    `trace` is tr(S), `squared_norm` |G|^2, `curved_trace` tr(HS), `curvature` G'HG. The last may be
    negative, where the loss curves down along its gradient; B_noise is None there.
    """

    trace: float
    squared_norm: float
    curved_trace: float
    curvature: float

    @property
    def b_simple(self) -> float | None:
        """tr(S) / |G|^2; None where |G|^2 is not above 0."""
        return self.trace / self.squared_norm if self.squared_norm > 0 else None

    @property
    def b_noise(self) -> float | None:
        """tr(HS) / G'HG; None where G'HG is not above 0."""
        return self.curved_trace / self.curvature if self.curvature > 0 else None


def hessian_noise(losses_N: Tensor, parameters: Sequence[Tensor]) -> HessianNoise:
    """B_noise and B_simple of N rows at the parameters as they are.

    With d_i = g_i - gbar: tr(HS) = sum d_i' H d_i / (N - 1), and gbar'H gbar is too large by
    tr(HS) / N on average. H is the Hessian of the mean of the losses, taken from the same rows, so
    that the two are unbiased only as far as H and the gradients are independent.

    Args:
        losses_N: each row's loss, whose mean is what trains, with a graph that leads to
            `parameters`.
        parameters: what is trained.

    Raises:
        AnalysisError: fewer than two rows.
    """
    num = len(losses_N)
    if num < 2:
        raise AnalysisError(f"{num} rows; a variance needs at least 2")
    rows_NP = torch.stack(
        [
            _flat(torch.autograd.grad(loss, parameters, retain_graph=True)).double()
            for loss in losses_N
        ]
    )
    mean_P = rows_NP.mean(dim=0)
    gradients = torch.autograd.grad(losses_N.mean(), parameters, create_graph=True)

    def curved(vector_P: Tensor) -> float:
        """v'Hv."""
        sizes = [one.numel() for one in parameters]
        parts = [
            part.reshape(one.shape).to(one.dtype)
            for part, one in zip(vector_P.split(sizes), parameters, strict=True)
        ]
        product = torch.autograd.grad(
            gradients, parameters, grad_outputs=parts, retain_graph=True, materialize_grads=True
        )
        return float(_flat(product).double() @ vector_P)

    away_NP = rows_NP - mean_P
    trace = float(away_NP.square().sum()) / (num - 1)
    curved_trace = sum(curved(one) for one in away_NP) / (num - 1)
    return HessianNoise(
        trace=trace,
        squared_norm=float(mean_P.square().sum()) - trace / num,
        curved_trace=curved_trace,
        curvature=curved(mean_P) - curved_trace / num,
    )


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([one.flatten() for one in tensors])

"""The output head at target tokens alone, its loss and its gradient in one pass.

Logits of a few thousand tokens at a time are in memory: the weights of the token losses are known
before the forward, so that a chunk's gradient is made at once and its logits are dropped. Rounding
is that of a plain causal LM: logits in the base's precision, softmax in float32.

Legend: M tokens, L target tokens, D hidden width, V vocabulary.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import NamedTuple

import torch
from torch import Tensor

from loratune.planning.packing import logit_rows


class Targets(NamedTuple):
    """Token `index_L` predicts `labels_L`; it is of slot `slots_L`, its loss counts `weights_L`."""

    index_L: Tensor
    labels_L: Tensor
    slots_L: Tensor
    weights_L: Tensor


@torch.no_grad()
def head_losses(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """float32[L] losses in nats, unweighted, and d(sum of weighted losses)/d hidden, M x D."""
    if hidden_MD.device.type == "cuda":
        from loratune.engine.kernels import token_losses  # Triton is there with CUDA alone.
    else:
        token_losses = losses_and_gradients
    losses = [hidden_MD.new_zeros(0, dtype=torch.float32)]
    grad_MD = torch.zeros_like(hidden_MD) if with_gradient else None
    step = min(logit_rows(len(weight_VD)), len(hidden_MD))
    # Of one size for all steps of a size, however many targets they have: an allocator keeps a
    # block for every size that it was ever asked for.
    room_LV = hidden_MD.new_empty(step, len(weight_VD))
    for begin in range(0, len(targets.index_L), step):
        index, labels, _, weights = (part[begin : begin + step] for part in targets)
        logits_LV = room_LV[: len(index)]
        if bias_V is None:
            torch.mm(hidden_MD[index], weight_VD.t(), out=logits_LV)
        else:
            torch.addmm(bias_V, hidden_MD[index], weight_VD.t(), out=logits_LV)
        losses.append(token_losses(logits_LV, labels, weights, with_gradient=with_gradient))
        if grad_MD is not None:
            grad_MD.index_copy_(0, index, logits_LV @ weight_VD)
    return torch.cat(losses), grad_MD


def losses_and_gradients(
    logits_LV: Tensor, labels_L: Tensor, weights_L: Tensor, *, with_gradient: bool
) -> Tensor:
    """-log softmax at the label, float32[L]; its gradient times the weight over the logits."""
    exact_LV = logits_LV.float()
    log_sum_L = torch.logsumexp(exact_LV, dim=-1)
    losses_L = log_sum_L - exact_LV.gather(1, labels_L[:, None]).squeeze(1)
    if with_gradient:
        grad_LV = exact_LV.sub_(log_sum_L[:, None]).exp_()
        grad_LV.scatter_add_(1, labels_L[:, None], -torch.ones_like(losses_L)[:, None])
        logits_LV.copy_(grad_LV * weights_L[:, None])
    return losses_L

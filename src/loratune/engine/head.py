"""The output head at target tokens alone, its loss and its gradient in one pass.

Logits of a few thousand tokens at a time are in memory: the weights of the token losses are known
before the forward, so that a chunk's gradient is made at once and its logits are dropped. Rounding
is that of a plain causal LM: logits in the base's precision, softmax in float32.

Legend: M tokens, L target tokens, D hidden width, V vocabulary.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Logits of so many numbers are in memory at once.
LOGITS_AT_ONCE = 2**27


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
    compiled: bool,
) -> tuple[Tensor, Tensor | None]:
    """float32[L] losses in nats, unweighted, and d(sum of weighted losses)/d hidden, M x D."""
    losses = list[Tensor]()
    grad_MD = torch.zeros_like(hidden_MD) if with_gradient else None
    step = max(256, LOGITS_AT_ONCE // len(weight_VD))
    per_token = _per_token(compiled)
    for begin in range(0, len(targets.index_L), step):
        index, labels, _, weights = (part[begin : begin + step] for part in targets)
        logits_LV = functional.linear(hidden_MD[index], weight_VD, bias_V)
        loss_L, grad_LV = per_token(logits_LV, labels, weights)
        losses.append(loss_L)
        if grad_MD is not None:
            grad_MD.index_copy_(0, index, grad_LV @ weight_VD)
    nothing = hidden_MD.new_zeros(0, dtype=torch.float32)
    return (torch.cat(losses) if losses else nothing), grad_MD


def _losses_and_gradients(
    logits_LV: Tensor, labels_L: Tensor, weights_L: Tensor
) -> tuple[Tensor, Tensor]:
    """-log softmax at the label, and its gradient times the weight in the logits' precision."""
    exact_LV = logits_LV.float()
    log_sum_L = torch.logsumexp(exact_LV, dim=-1)
    loss_L = log_sum_L - exact_LV.gather(1, labels_L[:, None]).squeeze(1)
    is_label = torch.arange(exact_LV.shape[1], device=labels_L.device)[None] == labels_L[:, None]
    grad_LV = ((exact_LV - log_sum_L[:, None]).exp() - is_label.float()) * weights_L[:, None]
    return loss_L, grad_LV.to(logits_LV.dtype)


@cache
def _per_token(compiled: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compiled, it reads the logits twice and writes once; the number of tokens may vary."""
    if not compiled:
        return _losses_and_gradients
    return torch.compile(_losses_and_gradients, dynamic=True)

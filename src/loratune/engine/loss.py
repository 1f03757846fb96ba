"""The loss: the mean over target tokens, however the rows are cut into micro-batches.

Legend: B rows, T tokens a row, V vocabulary.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from loratune.data.rows import EncodedRows, cut_microbatches, pad_rows


def target_loss_sum(model: nn.Module, part: "Microbatch") -> Tensor:
    """Cross-entropy in nats, summed over the target tokens of a micro-batch; a float32 scalar.

    Token t is predicted from the tokens before it; `is_target_BT[b, t]` says that it carries loss.
    The first token of a row can't carry any. Logits are taken to float32 at target positions only.
    """
    logits_BTV = model(
        input_ids=part.input_ids_BT, attention_mask=part.attention_mask_BT, use_cache=False
    ).logits
    chosen_BT = part.is_target_BT[:, 1:]
    predicted_MV = logits_BTV[:, :-1][chosen_BT].float()
    return functional.cross_entropy(
        predicted_MV, part.input_ids_BT[:, 1:][chosen_BT], reduction="sum"
    )


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Some rows of a batch, padded on the right, on the model's device."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    is_target_BT: Tensor


def microbatches(
    rows: EncodedRows,
    indices: NDArray[np.int64],
    *,
    pad_id: int,
    device: torch.device,
    tokens_per_microbatch: int,
) -> Iterator[Microbatch]:
    """The rows at `indices`, each once, cut so that rows x longest <= tokens_per_microbatch.

    One row always goes through whole, however long it is.
    """
    lengths = rows.lengths[indices]
    for cut in cut_microbatches(lengths, tokens_per_microbatch=tokens_per_microbatch):
        padded = pad_rows(rows, indices[cut], pad_id=pad_id)
        yield Microbatch(
            *(torch.from_numpy(array).to(device, non_blocking=True) for array in padded)
        )


def num_targets(rows: EncodedRows, indices: NDArray[np.int64]) -> int:
    """Target tokens of the rows at `indices`; a row's first token is never one."""
    taken = rows.take(indices)
    firsts = taken.offsets[:-1]
    return int(taken.is_target.sum()) - int(taken.is_target[firsts].sum())


@torch.no_grad()
def mean_token_loss(
    model: nn.Module,
    rows: EncodedRows,
    *,
    pad_id: int,
    device: torch.device,
    tokens_per_microbatch: int,
) -> float:
    """The mean loss in nats over all target tokens of `rows`; without dropout."""
    was_training = model.training
    model.eval()
    everything = np.arange(len(rows))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in microbatches(
        rows,
        everything,
        pad_id=pad_id,
        device=device,
        tokens_per_microbatch=tokens_per_microbatch,
    ):
        total += target_loss_sum(model, part)
    model.train(was_training)
    return float(total) / num_targets(rows, everything)

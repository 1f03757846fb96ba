"""How likely one model finds given texts after given prompts; one model at a time, in batches.

Slow and obvious on purpose, as `generate.py` is. Nothing here knows tasks, graders or adapters; an
adapter that is attached to `base.model` answers. Log-softmax in float32, whatever the model's own
precision.

Shapes: B rows of one batch, T tokens of the longest of them, V the vocabulary.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loratune.engine.decoding import ContinuationScore
from loratune.errors import EvaluationError
from loratune.models.load import Base, positions_of


@dataclass(frozen=True, slots=True)
class Continuation:
    """`continuation_ids` after `context_ids`, each with at least one token."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


def log_likelihoods(
    base: Base, asked: Sequence[Continuation], *, rows_per_batch: int = 16
) -> list[ContinuationScore]:
    """The log-likelihood of every continuation, in their order.

    Args:
        base: the model, with whatever adapter is attached to it; it is in eval mode meanwhile.
        asked: contexts and continuations.
        rows_per_batch: rows that go through the model at once; for speed and memory alone.

    Raises:
        EvaluationError: a context or continuation without a token, or one that together do not
            fit into the model's positions, of which the last token needs none.
    """
    positions = positions_of(base.model.config)
    for index, one in enumerate(asked):
        if not one.context_ids or not one.continuation_ids:
            raise EvaluationError(
                f"text {index}: its context or its continuation has no token; both need one"
            )
        if positions is not None and len(_whole(one)) - 1 > positions:
            raise EvaluationError(
                f"text {index}: a context of {len(one.context_ids)} tokens and a continuation of "
                f"{len(one.continuation_ids)} exceed the model's {positions} positions; shorten one"
            )
    order = sorted(range(len(asked)), key=lambda index: -len(_whole(asked[index])))
    found = dict[int, ContinuationScore]()
    training = [module for module in base.model.modules() if module.training]
    base.model.eval()
    try:
        for begin in range(0, len(order), rows_per_batch):
            chosen = order[begin : begin + rows_per_batch]
            batch = _of_batch(base, [asked[index] for index in chosen])
            found.update(zip(chosen, batch, strict=True))
    finally:
        for module in training:
            module.training = True
    return [found[index] for index in range(len(asked))]


def _whole(one: Continuation) -> tuple[int, ...]:
    return one.context_ids + one.continuation_ids


@torch.no_grad()
def _of_batch(base: Base, asked: Sequence[Continuation]) -> list[ContinuationScore]:
    rows = [_whole(one)[:-1] for one in asked]  # the last token is asked for, and nothing after it
    width = max(map(len, rows))
    device = base.model.device
    # Padded on the right: positions count from 0, and no row looks at what comes after its tokens.
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    outputs = base.model(ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False)
    results = list[ContinuationScore]()
    for logits_TV, one in zip(outputs.logits, asked, strict=True):
        begin = len(one.context_ids)
        end = begin + len(one.continuation_ids)
        scores_TV = logits_TV[begin - 1 : end - 1].float().log_softmax(dim=-1)
        targets_T = torch.tensor(one.continuation_ids, device=device)
        picked_T = scores_TV.gather(-1, targets_T[:, None])[:, 0]
        results.append(
            ContinuationScore(
                value=float(picked_T.double().sum()),
                num_tokens=len(one.continuation_ids),
                is_greedy=bool((scores_TV.argmax(dim=-1) == targets_T).all()),
            )
        )
    return results

"""Squared norms of single rows' gradients, in LoRA coordinates, without ever keeping a gradient.

A trained factor's gradient is a sum over tokens of outer products, so that a row's own is the sum
over its own tokens: for y = W x + s B A x with dL/dy = D over the T tokens of a row and H = X A',

    G_B = s D' H                     G_A = s (D B)' X

which the backward pass has all the parts of. Rows are formed a few at a time, squared, and dropped;
both engines share what stands here. The same numbers scaled by Adam's preconditioner are the sum of
(G^2) / v, so that one square serves both.

Legend: N rows, T tokens of the longest of them, P numbers of a factor, K and F its two sides.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.data.order import row_order
from loratune.data.prepare import PreparedData
from loratune.data.rows import EncodedRows
from loratune.engine.loss import num_targets
from loratune.planning.probes import Probing
from loratune.records import BlockSums, NoiseProbe, Trial

Block = Literal["A", "B", "other"]
BLOCKS: tuple[Block, ...] = ("A", "B", "other")
# Raw, and scaled by Adam's preconditioner.
NUM_KINDS = 2
# Numbers of row gradients in memory at once: 64 MiB in float32.
NUMBERS_AT_ONCE = 2**24
# Second moments beside a block's largest: squares, so gradients of 1e-5 of the largest.
ROUNDED_AWAY = 1e-10
# The seed of the order in which validation rows are looked at; the same for every trial.
HELD_OUT_SEED = 0


def inverse_second_moment(
    second: Tensor, *, largest: Tensor, beta2: float, num_updates: int
) -> Tensor:
    """1 / v with v = second / (1 - beta2^t), float32; 0 where there is no second moment.

    Adam's preconditioner P is its root with eps 0, so that sum (P g)^2 = sum g^2 / v. What is below
    ROUNDED_AWAY of `largest`, the block's largest second moment, counts as none: gradients that are
    0 but for rounding would otherwise weigh more than all others. That bound is relative, so that a
    rescaled adapter leaves out the same coordinates.
    """
    correction = 1 - beta2**num_updates
    # A quotient of what is below float32's smallest normal number overflows.
    has_one = second > (ROUNDED_AWAY * largest).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(has_one, correction / torch.where(has_one, second, 1.0), 0.0)


def add_outer_squares(
    left_NTK: Tensor, right_NTF: Tensor, inverse_KF: Tensor | None, *, into_N2: Tensor
) -> None:
    """Adds each row's |left' right|^2 to `into_N2`, and that times `inverse_KF` where it is given.

    Both are float32; `into_N2` is float64. No more than NUMBERS_AT_ONCE products at a time.
    """
    rows_at_once = max(1, NUMBERS_AT_ONCE // (left_NTK.shape[2] * right_NTF.shape[2]))
    for begin in range(0, len(left_NTK), rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        gradient_NKF = torch.bmm(left_NTK[rows].mT, right_NTF[rows])
        add_squares(gradient_NKF.flatten(1), inverse_KF, into_N2=into_N2[rows])


def add_squares(gradient_NP: Tensor, inverse_P: Tensor | None, *, into_N2: Tensor) -> None:
    """Adds each row's |g|^2, and its sum of g^2 times `inverse_P`; overwrites `gradient_NP`."""
    squares_NP = gradient_NP.square_()
    into_N2[:, 0] += squares_NP.sum(dim=1)
    if inverse_P is not None:
        into_N2[:, 1] += squares_NP @ inverse_P.flatten()


def mean_squares(gradient: Tensor, inverse: Tensor | None) -> Tensor:
    """float64[2]: |g|^2 of a whole gradient, and its sum of g^2 times `inverse` (0 without)."""
    squares = gradient.to(torch.float64).square()
    scaled = squares.new_zeros(()) if inverse is None else (squares * inverse).sum()
    return torch.stack([squares.sum(), scaled])


@dataclass(frozen=True, slots=True, eq=False)
class ProbedRows:
    """What a probe measured. `squares_N32` float64[N, blocks, kinds] are of single rows as they
    stand in the batch's token mean (each row's part of it, so that they sum to its gradient);
    `mean_32` of that gradient itself. `has_block` tells which blocks exist at all,
    `is_scaled` which of them have a second moment anywhere.
    """

    squares_N32: Tensor
    mean_32: Tensor
    has_block: Mapping[Block, bool]
    is_scaled: Mapping[Block, bool]


def probe_record(
    trial: Trial,
    *,
    update: int,
    split: Literal["train", "validation"],
    rows: EncodedRows,
    indices: NDArray[np.int64],
    probed: ProbedRows,
) -> NoiseProbe | None:
    """The record of a probe whose row i is `rows` at `indices[i]`; None where a norm is not finite.

    Rows with equal tokens and masks are one example. Without dropout their gradients are equal: an
    example of m rows has the gradient m g. With dropout m times the mean of |g|^2 bounds it from
    above.
    """
    squares_N32 = probed.squares_N32.cpu().numpy()
    mean_32 = probed.mean_32.cpu().numpy()
    if not (np.isfinite(squares_N32).all() and np.isfinite(mean_32).all()):
        return None
    num_rows = len(indices)
    numbers = _example_of(rows, indices)
    sizes = np.bincount(numbers)
    # |u_c|^2 with u_c = (C / n) times the sum of its rows' g, and g = n times the row's part.
    weights_N = (len(sizes) * sizes[numbers]).astype(np.float64) * len(sizes)
    sums_32 = np.einsum("n,nbk->bk", weights_N, squares_N32)
    return NoiseProbe(
        trial_id=trial.trial_id,
        update=update,
        split=split,
        num_rows=num_rows,
        num_examples=len(sizes),
        num_targets=num_targets(rows, indices),
        num_tokens=int(rows.lengths[indices].sum()),
        blocks=tuple(
            BlockSums(
                block=block,
                sum_squares=float(sums_32[at, 0]),
                mean_square=float(mean_32[at, 0]),
                scaled_sum_squares=float(sums_32[at, 1]) if probed.is_scaled[block] else None,
                scaled_mean_square=float(mean_32[at, 1]) if probed.is_scaled[block] else None,
            )
            for at, block in enumerate(BLOCKS)
            if probed.has_block[block]
        ),
    )


def _example_of(rows: EncodedRows, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each row, equal where tokens and masks are."""
    numbers = dict[tuple[bytes, bytes], int]()
    found = list[int]()
    for index in indices.tolist():
        ids, is_target = rows.row(index)
        found.append(numbers.setdefault((ids.tobytes(), is_target.tobytes()), len(numbers)))
    return np.array(found, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ProbeRows:
    """The rows that a probe looks at: those at `indices` of `rows`."""

    split: Literal["train", "validation"]
    rows: EncodedRows
    indices: NDArray[np.int64]


def probes_apart(
    trial: Trial, data: PreparedData, plan: Probing, *, update: int
) -> Sequence[ProbeRows]:
    """The probes before an update that need a pass of their own.

    Pooled training rows are the next ones of the trial's own stream. Held-out rows are the next
    ones of an order that all trials share, so that probes look at other rows until all were seen.
    """
    found = list[ProbeRows]()
    if plan.of_pooled(update):
        indices = row_order(
            trial.seed,
            num_rows=trial.num_train_rows,
            start=update * trial.batch_size,
            count=plan.pooled_rows,
        )
        found.append(ProbeRows("train", data.train, indices))
    if plan.held_out_every and plan.of_held_out(update) and data.validation is not None:
        indices = row_order(
            HELD_OUT_SEED,
            num_rows=len(data.validation),
            start=update // plan.held_out_every * plan.held_out_rows,
            count=plan.held_out_rows,
        )
        found.append(ProbeRows("validation", data.validation, indices))
    return found


def padded_rows(
    offsets: NDArray[np.int64], *, missing: int, numbers_at_once: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows [offsets[i], offsets[i + 1]) of tokens as padded tables: which rows, int64[n], and the
    places of their tokens, int64[n, T].

    `missing` stands behind the end of the shorter ones. A table holds rows of like length, so that
    little of it is padding (none is twice as long as another), and at most `numbers_at_once` places
    if it holds more than one row.
    """
    lengths = np.diff(offsets)
    classes = np.frexp(np.maximum(lengths, 1))[1]
    tables = list[tuple[NDArray[np.int64], NDArray[np.int64]]]()
    for one in np.unique(classes):
        alike = np.flatnonzero(classes == one)
        within = np.arange(int(lengths[alike].max()))[None, :]
        rows_at_once = max(1, numbers_at_once // within.size)
        for begin in range(0, len(alike), rows_at_once):
            rows = alike[begin : begin + rows_at_once]
            is_token = within < lengths[rows][:, None]
            places = np.where(is_token, offsets[:-1][rows][:, None] + within, missing)
            tables.append((rows, places))
    return tables

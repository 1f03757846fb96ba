"""Row gradients of some slots of a pack, picked up in the backward of every packed layer.

A packed layer's backward holds all that a row's own gradient takes (`engine.packed_linear`): what
its adapters saw, x', their A x' (with the correction's part), the output's gradient, and scale B.
The rows of a slot lie end to end; they are taken up as tables of rows of like length.

It is plain torch, for any device. A probed step runs eagerly, since tables have another size at
every step: on CUDA it is neither compiled nor replayed.

Legend: A slots, M tokens, N rows, T tokens of the longest of a table, D in, E out, R rank.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratune.engine.memory import sent
from loratune.engine.packed_linear import PackedGroup
from loratune.engine.row_gradients import (
    BLOCKS,
    NUM_KINDS,
    NUMBERS_AT_ONCE,
    ProbedRows,
    add_outer_squares,
    add_squares,
    inverse_second_moment,
    mean_squares,
    padded_rows,
)
from loratune.engine.slots import Slots, views

# The place of a token that a row does not have.
MISSING = -1


@dataclass(frozen=True, slots=True)
class ProbedSlot:
    """A slot whose rows are looked at: how often it has updated, and its beta2."""

    slot: int
    num_updates: int
    beta2: float


class PackedGradients:
    """Looks at the rows of some slots while one step goes backward; see `PackedModel.train_step`.

    Args:
        slots: the pack's.
        probed: the slots that are looked at, each with tokens in this step.
        row_slots: the slot of every row of the step, ascending.
        row_offsets: where every row begins, and the end.
    """

    def __init__(
        self,
        slots: Slots,
        probed: Sequence[ProbedSlot],
        *,
        row_slots: NDArray[np.int64],
        row_offsets: NDArray[np.int64],
    ) -> None:
        self._slots = slots
        self._probed = probed
        device = slots.params_AP.device
        widest = max(max(one.in_features, *one.out_features) for one in slots.layout.groups)
        self._tables = dict[int, list[tuple[Tensor, Tensor]]]()
        self.squares = dict[int, Tensor]()
        bounds = list(pairwise([0, *slots.layout.ends]))
        # Of blocks A, B and m, in this order.
        self._largest = {
            one.slot: [_largest(slots.second_AP[one.slot, low:high]) for low, high in bounds]
            for one in probed
        }
        for one in probed:
            first, last = np.searchsorted(row_slots, [one.slot, one.slot + 1])
            self._tables[one.slot] = [
                (sent(torch.from_numpy(rows), device), sent(torch.from_numpy(places), device))
                for rows, places in padded_rows(
                    row_offsets[first : last + 1],
                    missing=MISSING,
                    numbers_at_once=NUMBERS_AT_ONCE // widest,
                )
            ]
            self.squares[one.slot] = torch.zeros(
                int(last - first), len(BLOCKS), NUM_KINDS, dtype=torch.float64, device=device
            )

    @torch.no_grad()
    def add(
        self,
        group: PackedGroup,
        seen_MD: Tensor,
        h_MK: Tensor,
        before_ME: Tensor,
        grads_ME: Sequence[Tensor],
    ) -> None:
        """Take up one group's backward.

        Args:
            group: the layers.
            seen_MD: what their adapters saw.
            h_MK: A x of every member, the correction's part in it.
            before_ME: DoRA's output before its gain; empty where the pack trains no magnitudes.
            grads_ME: each member's dL/dy.
        """
        layout = self._slots.layout
        for one in self._probed:
            slot = one.slot
            part = views(self._slots.second_AP, layout, group.index)
            down_KD, up_RE, magnitude_E = (
                None
                if view is None or one.num_updates == 0
                else inverse_second_moment(
                    view[slot],
                    largest=largest,
                    beta2=one.beta2,
                    num_updates=one.num_updates,
                )
                for view, largest in zip(
                    (part.down_AKD, part.up_ARE, part.magnitude_AE),
                    self._largest[slot],
                    strict=True,
                )
            )
            scale = group.scale_A[slot]
            for rows_N, places_NT in self._tables[slot]:
                into_N32 = torch.zeros_like(self.squares[slot][: len(rows_N)])
                is_token_NT1 = (places_NT != MISSING)[:, :, None]
                x_NTD = seen_MD[places_NT].float()
                for member, (low, high) in enumerate(pairwise(group.segments)):
                    ranks = slice(member * layout.rank, (member + 1) * layout.rank)
                    # Zeros behind a row's end: products with anything there are zero.
                    given_NTE = torch.where(is_token_NT1, grads_ME[member][places_NT], 0)
                    grad_NTE = given_NTE
                    if group.gain_AE is not None:
                        gain_E = group.gain_AE[slot, low:high]
                        grad_NTE = (given_NTE * gain_E).to(given_NTE.dtype)
                    # In the base's precision, as the gradient itself is made.
                    grad_h_NTR = grad_NTE @ group.ups[0][slot, :, low:high].mT
                    add_outer_squares(
                        grad_h_NTR.float(),
                        torch.where(is_token_NT1, x_NTD, 0),
                        None if down_KD is None else down_KD[ranks],
                        into_N2=into_N32[:, 0],
                    )
                    h_NTR = torch.where(is_token_NT1, h_MK[:, ranks][places_NT].float(), 0)
                    add_outer_squares(
                        h_NTR * scale,
                        grad_NTE.float(),
                        None if up_RE is None else up_RE[:, low:high],
                        into_N2=into_N32[:, 1],
                    )
                    if group.inverse_norm_AE is not None:
                        # Zero for slots that train no magnitudes.
                        inverse_E = group.inverse_norm_AE[slot, low:high]
                        product_NTE = given_NTE.float() * before_ME[:, low:high][places_NT]
                        product_NTE = torch.where(is_token_NT1, product_NTE, 0)
                        add_squares(
                            product_NTE.sum(dim=1) * inverse_E,
                            None if magnitude_E is None else magnitude_E[low:high],
                            into_N2=into_N32[:, 2],
                        )
                self.squares[slot].index_add_(0, rows_N, into_N32)


def _largest(second_P: Tensor) -> Tensor:
    """The largest second moment of a block, 0 for a block that the pack does not have."""
    return second_P.max() if len(second_P) else second_P.new_zeros(())


def probed_rows(
    slots: Slots,
    one: ProbedSlot,
    squares_N32: Tensor,
    *,
    loss_scale: float,
    has_magnitudes: bool,
) -> ProbedRows:
    """What was seen of a slot's whole batch, whose gradient stands in the slot's row."""
    gradient_P, second_P = slots.grads_AP[one.slot], slots.second_AP[one.slot]
    mean_32 = torch.zeros_like(squares_N32[0])
    is_scaled = dict.fromkeys(BLOCKS, False)
    for at, (low, high) in enumerate(pairwise([0, *slots.layout.ends])):
        inverse = None
        if one.num_updates:
            second = second_P[low:high]
            inverse = inverse_second_moment(
                second, largest=_largest(second), beta2=one.beta2, num_updates=one.num_updates
            )
            is_scaled[BLOCKS[at]] = bool((inverse > 0).any())
        mean_32[at] = mean_squares(gradient_P[low:high], inverse)
    return ProbedRows(
        squares_N32=squares_N32 / loss_scale**2,
        mean_32=mean_32 / loss_scale**2,
        has_block={"A": True, "B": True, "other": has_magnitudes},
        is_scaled=is_scaled,
    )

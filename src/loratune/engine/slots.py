"""The numbers of the trials in a pack: one row a slot, one flat row for all layers of an adapter.

A row holds every layer's A, then every layer's B (transposed, so that A and B multiply alike), then
every layer's m. Flat rows make an update of all layers two kernels, a snapshot one copy and the
admission of a trial one transfer; the layers work on views.

    params, grads, first and second moments    float32, A x P
    factors    in the base's precision: what layers multiply with (`engine.packed_linear`)
    frozen     float32 A0 and B0, where a trial starts from a part of the base's weights

Ranks below the pack's are filled up with zeros: their gradients are zero, and stay so.

Legend: A slots, P numbers of a slot, D in, E out, R the pack's rank.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from loratune.methods.base import LayerTensors

# Regions begin at a multiple of so many numbers: whole vectors for the kernels.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Linear layers that read one input: full names, D, and each member's E."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def segments(self) -> list[int]:
        """Bounds of the members in the group's outputs."""
        return [0, *accumulate(self.out_features)]


@dataclass(frozen=True)
class RowLayout:
    """Where each group's numbers lie in a row, in numbers from its start."""

    groups: tuple[GroupShape, ...]
    rank: int
    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]
    m_offsets: tuple[int, ...]
    # Ends of the regions A, B and m; the last is P.
    ends: tuple[int, int, int]

    @property
    def size(self) -> int:
        """P: numbers of a slot."""
        return self.ends[2]


def lay_out(groups: Sequence[GroupShape], *, rank: int, magnitudes: bool) -> RowLayout:
    """The layout of rows for adapters of at most `rank`; m has no place without `magnitudes`."""
    at = 0
    offsets: list[tuple[int, ...]] = []
    ends: list[int] = []
    for sizes in (
        [len(group.names) * rank * group.in_features for group in groups],
        [rank * sum(group.out_features) for group in groups],
        [sum(group.out_features) * magnitudes for group in groups],
    ):
        begins: list[int] = []
        for size in sizes:
            begins.append(at)
            at += -(-size // ALIGNMENT) * ALIGNMENT
        offsets.append(tuple(begins))
        ends.append(at)
    return RowLayout(
        groups=tuple(groups),
        rank=rank,
        a_offsets=offsets[0],
        b_offsets=offsets[1],
        m_offsets=offsets[2],
        ends=(ends[0], ends[1], ends[2]),
    )


@dataclass(frozen=True, eq=False)
class Views:
    """A group's part of a buffer of rows: A x K x D, A x R x E and, if there, A x E."""

    down_AKD: Tensor
    up_ARE: Tensor
    magnitude_AE: Tensor | None


def views(rows_AP: Tensor, layout: RowLayout, group: int) -> Views:
    """The views of one group into a buffer of rows; m is None where the buffer has no place."""
    shape, rank = layout.groups[group], layout.rank
    num_slots, width = rows_AP.shape
    ranks, outputs = len(shape.names) * rank, sum(shape.out_features)
    at_a, at_b, at_m = (
        layout.a_offsets[group],
        layout.b_offsets[group],
        layout.m_offsets[group],
    )
    has_magnitude = layout.ends[2] > layout.ends[1] and width == layout.size
    return Views(
        down_AKD=rows_AP[:, at_a : at_a + ranks * shape.in_features].view(
            num_slots, ranks, shape.in_features
        ),
        up_ARE=rows_AP[:, at_b : at_b + rank * outputs].view(num_slots, rank, outputs),
        magnitude_AE=rows_AP[:, at_m : at_m + outputs] if has_magnitude else None,
    )


class Slots:
    """The rows of `num_slots` slots on one device.

    `corrected` and `magnitudes` say whether any trial of the pack starts from a part of the base,
    or trains magnitudes: the buffers for these exist only then.
    """

    def __init__(
        self,
        layout: RowLayout,
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        corrected: bool,
    ) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.magnitudes = layout.ends[2] > layout.ends[1]
        product = layout.ends[1]

        def rows(width: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(num_slots, width, dtype=kind, device=device)

        self.params_AP = rows(layout.size, torch.float32)
        self.grads_AP = rows(layout.size, torch.float32)
        self.first_AP = rows(layout.size, torch.float32)
        self.second_AP = rows(layout.size, torch.float32)
        self.factors = [rows(product, dtype) for _ in range(1 + corrected)]
        self.frozen_AP = rows(product, torch.float32) if corrected else None
        self.scale_A = torch.ones(num_slots, dtype=torch.float32, device=device)
        outputs = layout.ends[2] - layout.ends[1]
        # m / norm and 1 / norm of every output. One and zero where a slot trains no magnitudes: its
        # outputs stay as they are, and no gradient of m comes about.
        self.gain_AE = rows(outputs, torch.float32).fill_(1) if self.magnitudes else None
        self.inverse_norm_AE = rows(outputs, torch.float32) if self.magnitudes else None

    def put(self, slot: int, row_P: Tensor, *, frozen_P: Tensor | None, scale: float) -> None:
        """Begin with an adapter: its parameters and what it takes out of the base; all else zero.

        The slot's `factors` are the caller's to refresh.
        """
        self.params_AP[slot].copy_(row_P)
        for rows in (self.grads_AP, self.first_AP, self.second_AP):
            rows[slot].zero_()
        if self.frozen_AP is not None:
            if frozen_P is None:
                self.frozen_AP[slot].zero_()
            else:
                self.frozen_AP[slot].copy_(frozen_P)
        self.scale_A[slot] = scale
        if self.gain_AE is not None and self.inverse_norm_AE is not None:
            self.gain_AE[slot] = 1
            self.inverse_norm_AE[slot] = 0

    def refresh(self, slot: int) -> None:
        """Write what layers multiply with from a slot's parameters: `engine.packed_linear`.

        A - A0 and scale B; A0 and scale (B - B0).
        """
        end_a, end_b, _ = self.layout.ends
        params_P, scale = self.params_AP[slot], self.scale_A[slot]
        trained = self.factors[0][slot]
        trained[end_a:end_b] = scale * params_P[end_a:end_b]
        if self.frozen_AP is None:
            trained[:end_a] = params_P[:end_a]
            return
        frozen_P, correction = self.frozen_AP[slot], self.factors[1][slot]
        trained[:end_a] = params_P[:end_a] - frozen_P[:end_a]
        correction[:end_a] = frozen_P[:end_a]
        # A slot without a correction has A0 = 0, so that this half multiplies to zero.
        correction[end_a:end_b] = scale * (params_P[end_a:end_b] - frozen_P[end_a:end_b])


def to_row(layers: Mapping[str, LayerTensors], layout: RowLayout) -> Tensor:
    """float32[P] on the CPU: a trial's tensors as a row of the pack's rank."""
    row_P = torch.zeros(layout.size)
    for index, shape in enumerate(layout.groups):
        part = views(row_P[None], layout, index)
        _fill(part, shape, layers, rank=layout.rank, frozen=False)
    return row_P


def frozen_row(layers: Mapping[str, LayerTensors], layout: RowLayout) -> Tensor | None:
    """float32 A0 and B0 as a row without m; None where nothing is taken out of the base."""
    if all(layer.a0_RD is None for layer in layers.values()):
        return None
    row_P = torch.zeros(layout.ends[1])
    for index, shape in enumerate(layout.groups):
        part = views(row_P[None], layout, index)
        _fill(part, shape, layers, rank=layout.rank, frozen=True)
    return row_P


def re_lay(row_P: Tensor, source: RowLayout, target: RowLayout, *, rank: int) -> Tensor:
    """A row of one layout on the CPU in another: other groups, another rank of the pack.

    Numbers beyond a trial's own `rank` are zero in both. Rows without m stay without.
    """
    with_magnitudes = len(row_P) > source.ends[1] and target.size > target.ends[1]
    result_P = torch.zeros(target.size if with_magnitudes else target.ends[1])
    known = dict[str, tuple[Views, int, int, int]]()
    for index, shape in enumerate(source.groups):
        part = views(row_P[None], source, index)
        for member, name in enumerate(shape.names):
            low, high = shape.segments[member : member + 2]
            known[name] = (part, member * source.rank, low, high)
    for index, shape in enumerate(target.groups):
        part = views(result_P[None], target, index)
        for member, name in enumerate(shape.names):
            low, high = shape.segments[member : member + 2]
            there, begin, first, last = known[name]
            at = member * target.rank
            part.down_AKD[0, at : at + rank] = there.down_AKD[0, begin : begin + rank]
            part.up_ARE[0, :rank, low:high] = there.up_ARE[0, :rank, first:last]
            if part.magnitude_AE is not None and there.magnitude_AE is not None:
                part.magnitude_AE[0, low:high] = there.magnitude_AE[0, first:last]
    return result_P


def from_row(
    row_P: Tensor,
    layout: RowLayout,
    *,
    rank: int,
    frozen_P: Tensor | None,
    magnitudes: bool,
) -> dict[str, LayerTensors]:
    """A row on the CPU as a trial's tensors of its own rank, layer by layer; all are copies."""
    # Not contiguous(), which hands a transposed matrix of rank 1 out as a view of the row.
    dense = torch.contiguous_format
    layers = dict[str, LayerTensors]()
    for index, shape in enumerate(layout.groups):
        part = views(row_P[None], layout, index)
        frozen = None if frozen_P is None else views(frozen_P[None], layout, index)
        for member, name in enumerate(shape.names):
            ranks = slice(member * layout.rank, member * layout.rank + rank)
            low, high = shape.segments[member : member + 2]
            magnitude = part.magnitude_AE
            layers[name] = LayerTensors(
                a_RD=part.down_AKD[0, ranks].clone(),
                b_ER=part.up_ARE[0, :rank, low:high].T.clone(memory_format=dense),
                a0_RD=None if frozen is None else frozen.down_AKD[0, ranks].clone(),
                b0_ER=None
                if frozen is None
                else frozen.up_ARE[0, :rank, low:high].T.clone(memory_format=dense),
                magnitude_E=magnitude[0, low:high].clone()
                if magnitudes and magnitude is not None
                else None,
            )
    return layers


def _fill(
    part: Views,
    shape: GroupShape,
    layers: Mapping[str, LayerTensors],
    *,
    rank: int,
    frozen: bool,
) -> None:
    for member, name in enumerate(shape.names):
        layer = layers[name]
        a_RD, b_ER = (layer.a0_RD, layer.b0_ER) if frozen else (layer.a_RD, layer.b_ER)
        assert a_RD is not None
        assert b_ER is not None
        low, high = shape.segments[member : member + 2]
        first = member * rank
        part.down_AKD[0, first : first + len(a_RD)] = a_RD
        part.up_ARE[0, : len(a_RD), low:high] = b_ER.T
        if not frozen and layer.magnitude_E is not None and part.magnitude_AE is not None:
            part.magnitude_AE[0, low:high] = layer.magnitude_E

"""Rows of numbers and the tensors that they stand for."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratune.engine.slots import (
    ALIGNMENT,
    GroupShape,
    RowLayout,
    Slots,
    from_row,
    frozen_row,
    lay_out,
    re_lay,
    to_row,
)
from loratune.methods.base import LayerTensors

TOGETHER = (
    GroupShape(names=("q", "k", "v"), in_features=8, out_features=(8, 4, 4)),
    GroupShape(names=("o",), in_features=8, out_features=(8,)),
    GroupShape(names=("gate", "up"), in_features=8, out_features=(12, 12)),
)
APART = tuple(
    GroupShape(names=(name,), in_features=group.in_features, out_features=(width,))
    for group in TOGETHER
    for name, width in zip(group.names, group.out_features, strict=True)
)
WIDTHS = {group.names[0]: (group.in_features, group.out_features[0]) for group in APART}


def layers(rank: int, *, corrected: bool, magnitudes: bool, seed: int) -> dict[str, LayerTensors]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        name: LayerTensors(
            a_RD=draw(rank, d),
            b_ER=draw(e, rank),
            a0_RD=draw(rank, d) if corrected else None,
            b0_ER=draw(e, rank) if corrected else None,
            magnitude_E=draw(e) if magnitudes else None,
        )
        for name, (d, e) in WIDTHS.items()
    }


def assert_equal(some: dict[str, LayerTensors], others: dict[str, LayerTensors]) -> None:
    assert set(some) == set(others)
    for name in some:
        for field in fields(LayerTensors):
            one, other = getattr(some[name], field.name), getattr(others[name], field.name)
            assert (one is None) == (other is None), (name, field.name)
            assert one is None or torch.equal(one, other), (name, field.name)


@given(
    rank=st.integers(1, 4),
    pack_rank=st.integers(4, 7),
    together=st.booleans(),
    corrected=st.booleans(),
    magnitudes=st.booleans(),
    has_room=st.booleans(),
)
def test_a_row_gives_back_the_tensors_it_was_made_of(
    rank, pack_rank, together, corrected, magnitudes, has_room
):
    layout = lay_out(
        TOGETHER if together else APART, rank=pack_rank, magnitudes=magnitudes or has_room
    )
    started = layers(rank, corrected=corrected, magnitudes=magnitudes, seed=rank)
    row_P, frozen_P = to_row(started, layout), frozen_row(started, layout)
    assert row_P.shape == (layout.size,)
    assert (frozen_P is not None) == corrected
    back = from_row(row_P, layout, rank=rank, frozen_P=frozen_P, magnitudes=magnitudes)
    assert_equal(back, started)
    # Every number once, and nothing else: sums of squares agree.
    numbers = [one for layer in started.values() for one in (layer.a_RD, layer.b_ER)]
    numbers += [layer.magnitude_E for layer in started.values() if layer.magnitude_E is not None]
    assert int((row_P != 0).sum()) == sum(one.numel() for one in numbers)
    # What is given out is a copy.
    row_P.fill_(7.0)
    assert_equal(back, started)


@given(
    rank=st.integers(1, 4),
    ranks=st.tuples(st.integers(4, 7), st.integers(4, 7)),
    together=st.tuples(st.booleans(), st.booleans()),
    room=st.tuples(st.booleans(), st.booleans()),
    magnitudes=st.booleans(),
)
def test_laid_out_anew_a_row_is_what_the_other_layout_makes_of_the_tensors(
    rank, ranks, together, room, magnitudes
):
    source, target = (
        lay_out(TOGETHER if joined else APART, rank=wide, magnitudes=magnitudes or spare)
        for wide, joined, spare in zip(ranks, together, room, strict=True)
    )
    started = layers(rank, corrected=True, magnitudes=magnitudes, seed=rank)
    found_P = re_lay(to_row(started, source), source, target, rank=rank)
    expected_P = to_row(started, target)
    assert torch.equal(found_P, expected_P[: len(found_P)])
    assert not expected_P[len(found_P) :].any()
    if magnitudes:
        assert len(found_P) == target.size
    # A row without m stays without.
    frozen_P = frozen_row(started, source)
    assert frozen_P is not None
    expected_P = frozen_row(started, target)
    assert expected_P is not None
    assert torch.equal(re_lay(frozen_P, source, target, rank=rank), expected_P)


def test_regions_and_groups_begin_at_whole_vectors_and_do_not_overlap():
    for groups in (TOGETHER, APART):
        layout = lay_out(groups, rank=3, magnitudes=True)
        begins = [*layout.a_offsets, *layout.b_offsets, *layout.m_offsets]
        assert begins == sorted(set(begins))
        assert all(begin % ALIGNMENT == 0 for begin in [*begins, *layout.ends])
        assert layout.a_offsets[0] == 0
        assert layout.b_offsets[0] == layout.ends[0]
        assert layout.m_offsets[0] == layout.ends[1]


def slots_of(layout: RowLayout, *, corrected: bool) -> Slots:
    return Slots(
        layout, num_slots=3, dtype=torch.float32, device=torch.device("cpu"), corrected=corrected
    )


@pytest.mark.parametrize("corrected", [False, True])
def test_a_new_occupant_finds_nothing_of_the_one_before_not_even_nan(corrected):
    layout = lay_out(TOGETHER, rank=4, magnitudes=True)
    slots = slots_of(layout, corrected=corrected)
    buffers = [slots.params_AP, slots.grads_AP, slots.first_AP, slots.second_AP, *slots.factors]
    buffers += [
        one for one in (slots.frozen_AP, slots.gain_AE, slots.inverse_norm_AE) if one is not None
    ]
    for one in buffers:
        one.fill_(float("nan"))
    row_P = to_row(layers(2, corrected=False, magnitudes=False, seed=0), layout)
    slots.put(1, row_P, frozen_P=None, scale=2.0)
    slots.refresh(1)
    fresh = slots_of(layout, corrected=corrected)
    fresh.put(1, row_P, frozen_P=None, scale=2.0)
    fresh.refresh(1)
    others = [fresh.params_AP, fresh.grads_AP, fresh.first_AP, fresh.second_AP, *fresh.factors]
    others += [
        one for one in (fresh.frozen_AP, fresh.gain_AE, fresh.inverse_norm_AE) if one is not None
    ]
    for one, other in zip(buffers, others, strict=True):
        assert torch.equal(one[1], other[1])
        assert bool(one[0].isnan().all()), "and the neighbours are left alone"

"""Dropout that is a pure function of trial, place, position, layer and feature."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loratune.engine.laying import StepRows, lay_out_step
from loratune.engine.packed import _row_keys
from loratune.engine.packed_linear import Dropout, StepRouting
from tiny_trials import random_rows

WIDTH = 48


def keys_of(*, seed: int, place: int, num_rows: int, length: int = 8) -> Tensor:
    """int32[M]: the keys of so many rows of a trial's stream, as the engine lays them out."""
    rows = random_rows(200, seed=0)
    equal = rows.take(np.flatnonzero(rows.lengths == length)[:1].repeat(num_rows))
    step = StepRows(
        rows=equal,
        slots=np.zeros(num_rows, dtype=np.int64),
        weights=np.ones(num_rows),
        keys=_row_keys(seed, place, num_rows),
        fresh=frozenset(),
    )
    laid = lay_out_step(step, num_slots=1, longest_row=length)
    return torch.from_numpy(laid.token_keys)


def dropped(
    x_MD: Tensor, keys_M: Tensor, *, salt: int = 0, keep: float = 0.7, slots: Tensor | None = None
) -> Tensor:
    step = StepRouting()
    step.token_key_M = keys_M
    step.keep_A = torch.tensor([keep, 1.0])
    step.routing = [torch.zeros(len(keys_M), dtype=torch.int32) if slots is None else slots]
    return Dropout(salt=salt, device=x_MD.device)(x_MD, step)


def kept(keys_M: Tensor, *, salt: int = 0, keep: float = 0.7, width: int = WIDTH) -> Tensor:
    """bool[M, D]"""
    return dropped(torch.ones(len(keys_M), width), keys_M, salt=salt, keep=keep) != 0


KEYS = keys_of(seed=0, place=0, num_rows=250)


def assert_independent(some: Tensor, others: Tensor, *, keep: float = 0.7) -> None:
    """Two masks agree as often as two fair draws do, within five standard deviations."""
    expected = keep**2 + (1 - keep) ** 2
    share = float((some == others).double().mean())
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / some.numel())


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.95])
def test_the_stated_share_is_kept_and_scaled_up(keep):
    x_MD = torch.randn(len(KEYS), WIDTH, generator=torch.Generator().manual_seed(0))
    y_MD = dropped(x_MD, KEYS, keep=keep)
    is_kept = y_MD != 0
    num = is_kept.numel()
    assert abs(float(is_kept.double().mean()) - keep) < 5 * math.sqrt(keep * (1 - keep) / num)
    assert torch.equal(y_MD[is_kept], (x_MD / torch.tensor(keep))[is_kept])
    # So in each feature and for each token, not over all of them alone.
    for dim, count in ((0, len(KEYS)), (1, WIDTH)):
        shares = is_kept.double().mean(dim=dim)
        assert float((shares - keep).abs().max()) < 6 * math.sqrt(keep * (1 - keep) / count)


def test_the_mean_over_many_places_is_what_no_dropout_gives():
    x_D = torch.linspace(-2, 2, WIDTH)
    total_D, count = torch.zeros(WIDTH), 0
    for place in range(0, 2000, 250):
        keys_M = keys_of(seed=3, place=place, num_rows=250)
        y_MD = dropped(x_D.expand(len(keys_M), WIDTH), keys_M)
        total_D, count = total_D + y_MD.sum(dim=0), count + len(keys_M)
    deviation_D = x_D.abs() * math.sqrt(0.3 / 0.7 / count)
    assert bool(((total_D / count - x_D).abs() < 5 * deviation_D).all())


def test_a_slot_without_dropout_and_filler_pass_through_bit_for_bit():
    x_MD = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([0, 0, 1, 1, -1, -1], dtype=torch.int32)
    y_MD = dropped(x_MD, KEYS[:6], slots=slots)
    assert torch.equal(y_MD[2:], x_MD[2:])
    assert not torch.equal(y_MD[:2], x_MD[:2])


def test_a_token_drops_the_same_features_whoever_stands_beside_it():
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept(KEYS)[order], kept(KEYS[order]))
    assert torch.equal(kept(KEYS)[5:9], kept(KEYS[5:9]))


def test_where_a_batch_is_cut_does_not_matter():
    whole = keys_of(seed=1, place=24, num_rows=8)
    parts = [keys_of(seed=1, place=24 + at, num_rows=n) for at, n in ((0, 3), (3, 1), (4, 4))]
    assert torch.equal(torch.cat(parts), whole)


def test_places_positions_and_seeds_draw_anew():
    masks = kept(KEYS)
    by_row = masks.view(250, 8, WIDTH)
    assert_independent(by_row[1:], by_row[:-1])
    assert_independent(by_row[:, 1:], by_row[:, :-1])
    for other in (
        keys_of(seed=1, place=0, num_rows=250),
        keys_of(seed=0, place=250, num_rows=250),
        keys_of(seed=2**40, place=0, num_rows=250),
    ):
        assert_independent(kept(other), masks)


def test_no_two_rows_of_different_trials_share_a_key():
    keys = np.concatenate(
        [_row_keys(seed, 0, 5000) for seed in (0, 1, 2, 3, 7, 1000, 2**31, 2**62)]
    )
    assert len(np.unique(keys)) == len(keys)


def test_layers_draw_apart_and_are_not_shifted_copies_of_one_another():
    masks = {salt: kept(KEYS, salt=salt) for salt in (0, 1, 2, 13, 167)}
    for one in masks:
        for other in masks:
            for shift in range(WIDTH // 2):
                if (one, shift) < (other, 0):
                    left, right = masks[one][:, shift:], masks[other][:, : WIDTH - shift]
                    assert_independent(left, right)
                    assert_independent(masks[other][:, shift:], masks[one][:, : WIDTH - shift])


def test_features_draw_apart():
    masks = kept(KEYS)
    for shift in range(1, WIDTH // 2):
        assert_independent(masks[:, shift:], masks[:, :-shift])

"""Every token is in one tile and, if it is a trial's, in one chunk of its own slot."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratune.engine.routing import TILE, Routing, num_chunks, num_tiles, route
from loratune.planning.packing import TOKENS_SUMMED_AT_ONCE

COUNTS = st.lists(
    st.one_of(
        st.just(0),
        st.integers(0, 200),
        st.sampled_from([TILE, TOKENS_SUMMED_AT_ONCE, TOKENS_SUMMED_AT_ONCE + 1]),
    ),
    min_size=1,
    max_size=6,
)


@given(
    counts=COUNTS,
    filler=st.integers(0, 200),
    fixed_size=st.booleans(),
    fresh=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_every_token_is_once_in_a_tile_and_a_chunk_of_its_slot(counts, filler, fixed_size, fresh):
    num_tokens, num_slots = sum(counts) + filler, len(counts)
    whole, lengths = route(
        counts, fresh=fresh[:num_slots], num_tokens=num_tokens, fixed_size=fixed_size
    )
    assert whole.dtype == np.int32
    assert sum(lengths) == len(whole)
    routes = Routing.of(torch.from_numpy(whole), lengths)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)] + [-1] * filler
    assert routes.token_slot_M.tolist() == slots

    covered = list[tuple[int, int]]()
    tiles = (routes.tile_slot_T, routes.tile_begin_T, routes.tile_end_T)
    for slot, begin, end in zip(*(one.tolist() for one in tiles), strict=True):
        assert 0 <= end - begin <= TILE
        covered += [(token, slot) for token in range(begin, end)]
    assert sorted(covered) == list(enumerate(slots))

    chunks = (routes.chunk_slot_C, routes.chunk_begin_C, routes.chunk_end_C)
    spans = list(zip(*(one.tolist() for one in chunks), strict=True))
    bounds, firsts = routes.slot_bounds_A.tolist(), routes.slot_chunk_A.tolist()
    assert bounds[0] == 0
    assert len(bounds) == len(firsts) == num_slots + 1
    for slot, count in enumerate(counts):
        assert bounds[slot + 1] - bounds[slot] == count
        own = spans[firsts[slot] : firsts[slot + 1]]
        assert [one for one, _, _ in own] == [slot] * len(own)
        assert all(0 < end - begin <= TOKENS_SUMMED_AT_ONCE for _, begin, end in own)
        tokens = [token for _, begin, end in own for token in range(begin, end)]
        assert tokens == [token for token, one in enumerate(slots) if one == slot]
    assert sum(end - begin for _, begin, end in spans) == sum(counts), "no chunk but theirs"

    expected = [int(new and count > 0) for new, count in zip(fresh, counts, strict=False)]
    assert routes.is_fresh_A.tolist() == expected
    if fixed_size:
        assert len(routes.tile_slot_T) == num_tiles(num_tokens=num_tokens, num_slots=num_slots)
        assert len(spans) == num_chunks(num_tokens=num_tokens, num_slots=num_slots)


@given(some=COUNTS, others=COUNTS, num_tokens=st.integers(1, 5), fresh=st.booleans())
def test_steps_of_one_size_are_routed_by_tensors_of_one_size(some, others, num_tokens, fresh):
    num_slots = max(len(some), len(others))
    sizes = set[tuple[int, ...]]()
    total = max(sum(some), sum(others)) + num_tokens
    for counts in (some, others):
        padded = counts + [0] * (num_slots - len(counts))
        _, lengths = route(padded, fresh=[fresh] * num_slots, num_tokens=total, fixed_size=True)
        sizes.add(tuple(lengths))
    assert len(sizes) == 1

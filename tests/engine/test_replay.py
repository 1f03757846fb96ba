"""When the warm-ups of a step take their memory from what captured steps hold; CUDA is played."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from loratune.engine import replay
from loratune.engine.replay import ReplayPool

DEVICE = torch.device("cpu")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of CUDA, in order."""
    events = list[str]()

    class Pool:
        id = (0, 7)

    @contextmanager
    def use_mem_pool(pool: Any, device: Any) -> Generator[None]:
        assert isinstance(pool, Pool)
        assert torch.autograd.is_multithreading_enabled() is False
        events.append("into the pool")
        yield
        events.append("out of the pool")

    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(replay, "release_memory", lambda device: events.append("release"))
    return events


def warm_up(pool: ReplayPool, num_tokens: int, *, backward: bool, events: list[str]) -> list[str]:
    del events[:]
    with pool.warming_up(num_tokens, backward=backward):
        events.append("run")
    assert torch.autograd.is_multithreading_enabled()
    return list(events)


WITHIN = ["release", "into the pool", "run", "out of the pool"]


def test_a_step_runs_within_the_pool_once_one_as_large_was_captured(events: list[str]):
    pool = ReplayPool(DEVICE)
    assert pool.id == (0, 7)
    assert warm_up(pool, 4096, backward=True, events=events) == ["run"]
    assert warm_up(pool, 1024, backward=True, events=events) == WITHIN
    assert warm_up(pool, 4096, backward=False, events=events) == WITHIN
    assert warm_up(pool, 8192, backward=False, events=events) == ["run"]
    assert warm_up(pool, 8192, backward=True, events=events) == ["run"]
    assert warm_up(pool, 8192, backward=True, events=events) == WITHIN


def test_a_forward_alone_makes_no_room_for_a_backward(events: list[str]):
    pool = ReplayPool(DEVICE)
    assert warm_up(pool, 4096, backward=False, events=events) == ["run"]
    assert warm_up(pool, 1024, backward=True, events=events) == ["run"]


def test_what_failed_has_made_no_room(events: list[str]):
    pool = ReplayPool(DEVICE)
    with (
        pytest.raises(torch.OutOfMemoryError),
        pool.warming_up(4096, backward=True),
    ):
        raise torch.OutOfMemoryError("no room")
    assert warm_up(pool, 1024, backward=True, events=events) == ["run"]


def test_an_allocator_without_pools_is_asked_for_none(
    events: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    pool = ReplayPool(DEVICE)
    assert pool.id == (0, 1)
    assert warm_up(pool, 4096, backward=True, events=events) == ["run"]
    assert warm_up(pool, 1024, backward=True, events=events) == ["run"]

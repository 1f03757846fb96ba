"""Forward and backward over steps of one size, captured once as CUDA graphs and then replayed.

A small model's kernels are shorter than their launches: a step of a 135M model has thousands of
them. Replayed, a step is two launches. What differs from step to step stands in buffers that keep
their addresses. The head and its loss stay outside: the number of target tokens varies.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from loratune.engine.memory import release_memory, sent

# Before a capture everything must have run: compilers, autotuners, handles, workspaces.
WARM_UPS = 2


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device for everything that is warmed up or captured.

    cuBLAS has a workspace for every stream that it has run on, and never gives it back.
    """
    return torch.cuda.Stream(device)


class ReplayPool:
    """The memory of all steps that are captured over one model: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The other allocator, CUDA's own asynchronous one, has no pools to take memory from.
        is_native = torch.cuda.get_allocator_backend() == "native"
        self._pool = torch.cuda.MemPool() if is_native else None
        self.id = torch.cuda.graph_pool_handle() if self._pool is None else self._pool.id
        self._captured: list[tuple[int, bool]] = []

    @contextmanager
    def warming_up(self, num_tokens: int, *, backward: bool) -> Generator[None]:
        """Take memory from the pool once there is enough of it: what was captured is not running.

        Elsewhere it would be taken twice, since a pool gives nothing back. Not before a step was
        captured that is as large: what a first call leaves for good, workspaces of cuBLAS and of
        our kernels, would hold the pool's segments when all else in them is gone.
        """
        is_covered = any(
            tokens >= num_tokens and (with_backward or not backward)
            for tokens, with_backward in self._captured
        )
        if is_covered and self._pool is not None:
            # Within a pool the allocator does not give back what is cached outside of it.
            release_memory(self._device)
            with (
                # A pool is one thread's, and a backward has a thread of its own elsewhere.
                torch.autograd.set_multithreading_enabled(False),
                torch.cuda.use_mem_pool(self._pool, self._device),
            ):
                yield
        else:
            yield
        self._captured.append((num_tokens, backward))


class Replay:
    """A body captured over buffers of its own.

    `body` takes the buffers and returns the embedded tokens, which require a gradient where
    `backward` is wanted, and the last hidden states. It runs a few times on `example`, whose
    gradients must be nobody's, before it is captured: that within `warming_up`.
    """

    def __init__(
        self,
        body: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
        example: Sequence[Tensor],
        *,
        backward: bool,
        device: torch.device,
        pool: Any,
        warming_up: AbstractContextManager[None] | None = None,
    ) -> None:
        self._buffers = [sent(one, device) for one in example]
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with (
            torch.cuda.stream(stream),
            torch.set_grad_enabled(backward),
            warming_up or nullcontext(),
        ):
            for _ in range(WARM_UPS):
                _run(body, self._buffers, backward=backward)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        # A captured step has memory of its own: what the warm-ups had must be free for it.
        release_memory(device)
        self._forward = torch.cuda.CUDAGraph()
        self._backward = torch.cuda.CUDAGraph() if backward else None
        capture = torch.cuda.graph(self._forward, pool=pool, stream=stream)
        with torch.set_grad_enabled(backward), capture:
            embedded, hidden = body(self._buffers)
        if self._backward is not None:
            self._grad_hidden = torch.zeros_like(hidden)
            with torch.cuda.graph(self._backward, pool=pool, stream=stream):
                torch.autograd.grad(hidden, embedded, self._grad_hidden)
        self._hidden = hidden.detach()

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The hidden states for these inputs (on the CPU); they last until the next call."""
        for buffer, one in zip(self._buffers, inputs, strict=True):
            buffer.copy_(one.pin_memory(), non_blocking=True)
        self._forward.replay()
        return self._hidden

    def backward(self, grad_hidden: Tensor) -> None:
        """The backward of the latest forward."""
        self._grad_hidden.copy_(grad_hidden)
        cast("torch.cuda.CUDAGraph", self._backward).replay()


def _run(
    body: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
    buffers: Sequence[Tensor],
    *,
    backward: bool,
) -> None:
    embedded, hidden = body(buffers)
    if backward:
        torch.autograd.grad(hidden, embedded, torch.zeros_like(hidden))

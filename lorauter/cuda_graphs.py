"""CUDA graphs beside whatever else a process computes: they do not wait for it, nor it for them.

Knows nothing of what is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, which is there once what is launched so far is computed."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def landed(found: Tensor) -> Tensor:
    """A tensor of a device on the CPU. Who waits for a GPU sleeps: `cpu()` looks all the time, and has a core for that
    which others in the machine need."""
    if not found.is_cuda:
        return found.cpu()
    here = to_host(found)
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    done.record()
    done.synchronize()
    return here


class Landing:
    """A place in the host's memory for what a device computes again and again, one lot at a time: to have one for each
    lot, and what says that it is there, costs more than to have the numbers come.

    Args:
        most: of what lands, the most that does at once.
    """

    def __init__(self, most: Tensor) -> None:
        self._here = torch.empty(most.shape, dtype=most.dtype, pin_memory=most.is_cuda)
        self._done: Any = torch.cuda.Event(blocking=True) if most.is_cuda else None  # type: ignore[no-untyped-call]

    def landed(self, found: Tensor) -> Tensor:
        """What `landed` says, of as many rows as there are at most."""
        here = self._here[: len(found)]
        here.copy_(found, non_blocking=True)
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
        return here.clone()


class Recorded(NamedTuple):
    """A graph, what it computes, and how. That holds all that the graph reads, which has to stay where it is: a graph
    has addresses."""

    graph: torch.cuda.CUDAGraph
    found: Tensor
    compute: Callable[[], Tensor]


class GraphRecorder:
    """Records graphs, and has them repeated one at a time.

    Args:
        device: a GPU, which has to have what they read of others.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()  # a graph has one place for what goes in
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """To record, to fill in, to repeat and to read, on a stream of their own."""
        with self._lock, torch.cuda.stream(self._stream):
            yield

    def record(self, compute: Callable[[], Tensor]) -> Recorded:
        """Within `alone`: what is computed becomes a graph."""
        compute()  # what is made on the first run may not be in a capture
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self._pool, capture_error_mode="thread_local")  # other threads compute meanwhile
        try:
            found = compute()
        finally:
            graph.capture_end()
        return Recorded(graph, found, compute)

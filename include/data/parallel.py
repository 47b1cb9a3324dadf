"""Parallel work on the parts of a dataset: forked processes, results in order, a bounded number of them in memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from include.errors import ProcessLost

Part = TypeVar("Part")
Output = TypeVar("Output")

_work: Callable[[Any], Any]  # set before the fork, so that the child processes inherit the function and its data


def in_order(work: Callable[[Part], Output], parts: Sequence[Part]) -> Iterator[Output]:
    """Yield `work(part)` for each part, in order, computed on all cores that this process may use.

    Forked processes share the objects of the caller (a vocabulary, for example) at no cost. The calling process itself
    never runs `work`, not even for a single part: a library that starts threads there could leave a lock held, and a
    later fork would wait for it for ever.

    Args:
        work: a function, which may be a closure. Its results must be picklable.

    Raises:
        ProcessLost: a process was killed.
    """
    processes = min(len(os.sched_getaffinity(0)), len(parts))
    if not processes:
        return
    global _work
    _work = work
    waiting: deque[Future[Any]] = deque()
    rest = iter(parts)
    # the work makes many small objects without cycles: cycle collection would take a fifth of the time
    with forked(processes, gc.disable) as pool:
        try:
            while True:
                while len(waiting) < 2 * processes and (part := next(rest, None)) is not None:
                    waiting.append(pool.submit(_call, part))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ProcessLost("a data process was killed, probably because memory was short", "Run again") from error


def forked(processes: int, initializer: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """Return a pool of forked processes, which share the caller's objects. It also works in a Celery worker's task."""
    # Celery runs tasks in daemonic processes, which may not have children; those of this pool end before their parent
    multiprocessing.current_process().daemon = False
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=initializer)


def _call(part: Any) -> Any:
    return _work(part)


@contextmanager
def no_collection() -> Iterator[None]:
    """Switch cycle collection off while many objects are made that stay: a large JSON document, an import."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

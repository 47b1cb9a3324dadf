"""Work on many parts of a dataset at once: forked processes, results in order, a bounded number of them in memory."""

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
Outcome = TypeVar("Outcome")

_work: Callable[[Any], Any]  # set before the processes fork, so that they have it with all that it refers to


def in_order(work: Callable[[Part], Outcome], parts: Sequence[Part]) -> Iterator[Outcome]:
    """`map(work, parts)` on all cores that this process may use.

    `work` may be a closure, its outcomes must be picklable.

    Forked processes share what the caller has built (a vocabulary, say) at no cost. No part is done here, not even a
    single one: libraries that start threads would leave locks that a later fork waits for in vain.

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
    # a part makes many small objects, none of them in a cycle: looking for cycles would cost a fifth of the time
    with forked(processes, gc.disable) as pool:
        try:
            while True:
                while len(waiting) < 2 * processes and (part := next(rest, None)) is not None:
                    waiting.append(pool.submit(_call, part))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ProcessLost("a data process was killed, perhaps for want of memory", "Run again") from error


def forked(processes: int, initializer: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """Processes that share what the caller has built, also in a task of a Celery worker."""
    # Celery marks its processes as ones that may have no children; the pool's end before they do
    multiprocessing.current_process().daemon = False
    return ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=initializer)


def _call(part: Any) -> Any:
    return _work(part)


@contextmanager
def no_collection() -> Iterator[None]:
    """No search for reference cycles while so much is made that stays: a large JSON document, an import."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

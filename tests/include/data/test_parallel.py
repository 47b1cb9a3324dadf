"""Work in forked processes, wherever the caller itself runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import pytest

from include.data.parallel import in_order
from include.errors import ProcessLost


def doubled(results: Any) -> None:
    results.put(list(in_order(lambda n: (2 * n, os.getpid()), range(5))))


@pytest.mark.parametrize("daemon", [False, True])
def test_parts_are_done_elsewhere_and_come_in_order_also_in_a_celery_workers_task(daemon: bool) -> None:
    results = multiprocessing.get_context("fork").SimpleQueue()
    caller = multiprocessing.get_context("fork").Process(target=doubled, args=(results,), daemon=daemon)
    caller.start()
    caller.join(60)
    assert caller.exitcode == 0
    found = results.get()
    assert [number for number, _ in found] == [0, 2, 4, 6, 8]
    assert caller.pid not in {pid for _, pid in found}


def test_a_killed_part_is_a_lost_process() -> None:
    with pytest.raises(ProcessLost, match="killed"):
        list(in_order(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(2)))

"""Shutdown of a GPU worker: its trainings save a checkpoint at once, and their retries continue on another worker.

Celery itself either waits for hours until the tasks have ended (SIGTERM), or leaves them behind (SIGQUIT), and the end
of the container kills them. `CONFIG` is Airflow's own configuration: the worker loads this module because
`[celery] celery_config_options` names it.
"""

from __future__ import annotations

import threading
import time

import psutil
from airflow.providers.celery.executors.default_celery import DEFAULT_CELERY_CONFIG as CONFIG
from celery.signals import worker_shutting_down

ENGINE = "include.engine"

__all__ = ["CONFIG"]


@worker_shutting_down.connect
def end_trainings(**_: object) -> None:
    """Send SIGTERM to every engine process, also to processes that start while the worker shuts down."""
    threading.Thread(target=_end_trainings, daemon=True).start()


def _end_trainings() -> None:
    signalled: set[int] = set()
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                engine, parent = _is_engine(process), process.parent()
                # the first process of several passes the signal on
                if engine and process.pid not in signalled and not (parent and _is_engine(parent)):
                    signalled.add(process.pid)
                    process.terminate()
            except psutil.NoSuchProcess:
                continue
        time.sleep(1)


def _is_engine(process: psutil.Process) -> bool:
    return ENGINE in process.cmdline()

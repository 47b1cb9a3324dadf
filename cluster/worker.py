"""How a GPU worker ends: its trainings save a checkpoint, at once, and their next tries go on from there elsewhere.

Celery's own ways are to wait for hours until the tasks have ended (SIGTERM), or to leave without them (SIGQUIT), which
in a container ends them. `CONFIG` is Airflow's own: that `[celery] celery_config_options` names it makes the worker
load this module.
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
    """Pass SIGTERM on to every process of the engine, also to those that are yet to come, while the worker waits."""
    threading.Thread(target=_end_trainings, daemon=True).start()


def _end_trainings() -> None:
    told: set[int] = set()
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                engine, parent = _is_engine(process), process.parent()
                # the first one of several knows what to do with the others
                if engine and process.pid not in told and not (parent and _is_engine(parent)):
                    told.add(process.pid)
                    process.terminate()
            except psutil.NoSuchProcess:
                continue
        time.sleep(1)


def _is_engine(process: psutil.Process) -> bool:
    return ENGINE in process.cmdline()

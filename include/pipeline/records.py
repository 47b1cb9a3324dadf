"""The records of a run: one small document per stage, which the report, the command line and alerts read."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from include.errors import NoSpace, RetuneError, TransientError, UpToDate
from include.storage.artifacts import STORE_SETTING, Store
from include.storage.files import now
from include.storage.object_store import object_errors

log = logging.getLogger("airflow.task.retune")  # below Airflow's own task logger, so that the UI shows it

# all that goes from task to task: recipe, run, the fingerprint of each stage so far; in a sweep, also the candidate
Lineage = dict[str, str]


class Record:
    """The document of a stage in the run's folder: state, summary, seconds, error, and the candidate of a sweep.

    Args:
        failures_only: write the record only on failure; for tasks that neither begin nor end a stage.
    """

    def __init__(
        self,
        store: Store,
        recipe: str,
        run_id: str,
        stage: str,
        name: str,
        candidate: str | None,
        failures_only: bool = False,
    ):
        self._store, self._recipe, self._run_id, self._name = store, recipe, run_id, name
        self._failures_only = failures_only
        self._began = time.monotonic()
        self.content: dict[str, Any] = {
            "stage": stage,
            "state": "running",
            "started_at": now("milliseconds"),
            "summary": "",
        }
        if candidate is not None:
            self.content["candidate"] = candidate
        self._write()

    def progress(self, line: str) -> None:
        """Log a line and show it to whoever follows the run. If the store does not answer, the work goes on."""
        log.info("%s", line)
        self.content["summary"] = line
        with suppress(TransientError):
            self._write()

    def add_seconds(self, seconds: float) -> None:
        """Add the time that earlier tasks of the stage took."""
        self._began -= seconds

    def close(self, state: str, **content: Any) -> None:
        """Write the final state (`done`, `failed`, `skipped`, `waiting`) and the seconds."""
        self._failures_only = self._failures_only and state != "failed"
        self.content.update(state=state, seconds=round(time.monotonic() - self._began, 2), **content)
        self._write()

    def _write(self) -> None:
        if not self._failures_only:
            self._store.write_record(self._recipe, self._run_id, self._name, self.content)


@contextmanager
def recorded(
    store: Store, recipe: str, run_id: str, stage: str, lineage: Lineage | None = None, part: str = ""
) -> Iterator[Record]:
    """Write the run's record of a stage, also if the stage fails, and log a failure in one line.

    Args:
        lineage: needed for the candidates of a sweep, whose records have names of their own (see `record_name`).
        part: name of the part that this task does, if it does not do the whole stage; then only a failure is recorded.
    """
    record, lineage = None, lineage or {}
    try:
        name = record_name(stage, lineage)
        record = Record(store, recipe, run_id, stage, name, lineage.get("candidate"), failures_only=bool(part))
        with object_errors(f"the store {store.uri}", STORE_SETTING), _disk_errors():
            yield record
    except UpToDate as error:
        if record:
            record.close("skipped", summary=error.what)
        log.info("%s", error)
        raise
    except BaseException as error:
        what, do = (
            f"{type(error).__name__}: {error}",
            "See the log; this is a bug of Retune or a problem of its environment",
        )
        if isinstance(error, RetuneError):
            what, do = error.what, error.do
        elif isinstance(error, KeyboardInterrupt):
            what, do = f"{stage} was stopped", "Run again: finished stages are reused"
        what = f"{part}: {what}" if part else what
        if record:
            with suppress(RetuneError):  # if the store itself failed, the line below still reports the failure
                record.close("failed", summary=what, error={"kind": type(error).__name__, "what": what, "do": do})
        log.error("%s failed: %s", stage, f"{what}. {do}." if do else f"{what}.")
        raise


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Translate the error of a full disk, on which any stage may write.

    Raises:
        NoSpace: a disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space is left on a disk ({error})", "Free some space and retry the task") from error
        raise


def record_name(stage: str, lineage: Lineage) -> str:
    """Return the stage's name; for a candidate of a sweep, followed by the fingerprint of its pinned recipe."""
    return f"{stage}.{lineage['resolve']}" if "candidate" in lineage else stage

"""Writes the note of a run, which Airflow's grid shows, from the XCom of `report`. Tasks cannot write notes."""

from __future__ import annotations

from typing import Any

from airflow.listeners import hookimpl
from airflow.models.xcom import XComModel
from airflow.plugins_manager import AirflowPlugin
from sqlalchemy.orm import object_session

from plugins.links import NOTE


class _Listener:
    """Airflow calls these hooks at the end of a run, with a session that it commits."""

    @hookimpl
    def on_dag_run_success(self, dag_run: Any, msg: str) -> None:
        _write_note(dag_run)

    @hookimpl
    def on_dag_run_failed(self, dag_run: Any, msg: str) -> None:
        _write_note(dag_run)


def _write_note(dag_run: Any) -> None:
    session = object_session(dag_run)
    if session is None or dag_run.note:  # keep the note of a person
        return
    query = XComModel.get_many(run_id=dag_run.run_id, dag_ids=dag_run.dag_id, task_ids="report", key=NOTE, limit=1)
    if row := session.scalars(query).first():
        dag_run.note = XComModel.deserialize_value(row)


class RunNotes(AirflowPlugin):
    """Registers the listener."""

    name = "retune_run_notes"
    listeners = [_Listener()]  # noqa: RUF012

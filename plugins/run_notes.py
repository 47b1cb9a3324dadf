"""What a run's `report` has to say becomes the run's note, which the grid shows. Tasks cannot write notes."""

from __future__ import annotations

from typing import Any

from airflow.listeners import hookimpl
from airflow.models.xcom import XComModel
from airflow.plugins_manager import AirflowPlugin
from sqlalchemy.orm import object_session

from plugins.links import NOTE


class _Listener:
    """Airflow calls it where a run ends, with a session that it commits."""

    @hookimpl
    def on_dag_run_success(self, dag_run: Any, msg: str) -> None:
        _take_note(dag_run)

    @hookimpl
    def on_dag_run_failed(self, dag_run: Any, msg: str) -> None:
        _take_note(dag_run)


def _take_note(dag_run: Any) -> None:
    session = object_session(dag_run)
    if session is None or dag_run.note:  # a person's own note stays
        return
    said = XComModel.get_many(run_id=dag_run.run_id, dag_ids=dag_run.dag_id, task_ids="report", key=NOTE, limit=1)
    if row := session.scalars(said).first():
        dag_run.note = XComModel.deserialize_value(row)


class RunNotes(AirflowPlugin):
    """See the module."""

    name = "retune_run_notes"
    listeners = [_Listener()]  # noqa: RUF012

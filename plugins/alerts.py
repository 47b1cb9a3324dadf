"""Alerts: notify people how a run ended, or that it is late. The channels are in `plugins/alert_channels.py`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from airflow.sdk import BaseNotifier
from airflow.sdk.configuration import conf
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from airflow.sdk.exceptions import AirflowNotFoundException
from tenacity import AsyncRetrying, retry_if_exception_type
from tenacity.stop import stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from include.errors import PermanentError, TransientError
from include.paths import HEADLESS
from include.pipeline.records import log
from include.recipe import Recipe
from include.storage.artifacts import Store
from plugins.alert_channels import CHANNELS, Message

SUMMARY = "summary"  # key of the XCom with the summary of `report`
NOTIFIED = "notified"  # key in the task's state: which recipients were notified of which report
EVENTS = {"published": "published", "refused": "refused", "rejected": "refused", "failed": "failed"}  # by verdict
LEVELS = {"published": logging.INFO, "refused": logging.WARNING, "late": logging.WARNING, "failed": logging.ERROR}
MAX_REASON_CHARS = 1500  # longer reasons are cut; the report has the complete text
TASK_RETRIES = 3  # retries of the alert task, about 20, 40 and 80 s apart


class Alert(BaseNotifier):
    """Notifies the recipients in the recipe. A failed alert does not change the run's state.

    Given the context of a task, the message says how the run ended. Given the context of a missed deadline, it says
    that the run is late.

    Args:
        recipe: name of the recipe and of its DAG.
        on: the events to send: some of `published`, `refused`, `failed` and `late`. Every event is also logged.
        recipients: the recipients by recipe field of their channel.
        context: see `BaseNotifier`.
    """

    def __init__(self, recipe: str, on: list[str], recipients: dict[str, list[str]], context: Any = None):
        super().__init__(context=context)
        self.recipe, self.on, self.recipients = recipe, on, recipients
        self.notified: list[str] = []  # labels of the recipients that have got the message

    @staticmethod
    def settings(recipe: Recipe) -> dict[str, Any]:
        """Return a recipe's arguments for this class as plain JSON values."""
        recipients = {channel.recipe_field: getattr(recipe, channel.recipe_field) for channel in CHANNELS}
        return {"recipe": recipe.name, "on": recipe.alert_on, "recipients": recipients}

    def notify(self, context: Any) -> None:
        """Notify each recipient once. A second call, or a retry of the task, notifies only those still missing.

        Raises:
            TransientError: a recipient could not be notified.
            PermanentError: recipients could not be notified because their connections do not exist.
        """
        if "deadline" in context:
            run = context["dag_run"]
            records = _stage_records(self.recipe, run["dag_run_id"])
            if message := late(self.recipe, run, context["deadline"]["deadline_time"], records):
                self._send(message, lambda: None)
            return
        summary = context["ti"].xcom_pull(task_ids="report", key=SUMMARY)
        if message := ended(self.recipe, context["run_id"], summary):
            state, report = context["task_state_store"], summary["finished_at"] if summary else ""
            stored = state.get(NOTIFIED) or {}
            self.notified = stored["recipients"] if stored.get("report") == report else []
            self._send(message, lambda: state.set(NOTIFIED, {"report": report, "recipients": self.notified}))
        else:
            log.info("no alert for the verdict %s", summary["verdict"])

    async def async_notify(self, context: Any) -> None:
        """Call `notify` in the triggerer without blocking its other triggers, and retry it on TransientError."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientError), stop=stop_after_attempt(TASK_RETRIES + 1),
            wait=wait_exponential_jitter(initial=20, max=600), reraise=True,
        )  # fmt: skip
        await retrying(asyncio.to_thread, self.notify, context)

    def _send(self, message: Message, save: Callable[[], None]) -> None:
        """Log the message and send it to every recipient not yet notified; a failure does not stop the others.

        Args:
            save: called after each recipient, to store `notified`.
        """
        if not self.notified:
            log.log(LEVELS[message.event], "%s", message.text().rstrip())
        missed: list[str] = []
        setups: dict[str, None] = {}  # in order, each once
        missing_connections_only = True
        for channel in CHANNELS if message.event in self.on else ():
            for recipient in self.recipients[channel.recipe_field]:
                label = channel.label.format(recipient)
                if label in self.notified:
                    continue
                try:
                    channel.send_with_retries(message, recipient)
                except Exception as error:  # of any kind: the other recipients must be notified
                    missing_connections_only &= isinstance(error, AirflowNotFoundException)
                    missed.append(label)
                    setups[channel.setup] = None
                    log.warning("%s was not sent: %s", label, error)
                else:
                    log.info("%s was sent", label)
                    self.notified.append(label)
                    save()
        if missed:
            error_class = PermanentError if missing_connections_only else TransientError
            raise error_class(
                f"not sent: {', '.join(missed)}",
                f"Check the connections under Admin > Connections: {'; '.join(setups)}",
            )


def deadline(recipe: Recipe) -> DeadlineAlert | None:
    """Return Airflow's deadline of a recipe: the triggerer calls `Alert` if a run has not ended in time.

    Return None without `deadline_hours`, and for `airflow dags test`, which cannot run a DAG that has a deadline.
    """
    if recipe.deadline_hours is None or os.environ.get(HEADLESS):
        return None
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=recipe.deadline_hours),
        callback=AsyncCallback(Alert, kwargs=Alert.settings(recipe)),
    )


def ended(recipe: str, run_id: str, summary: dict[str, Any] | None) -> Message | None:
    """Return the message about a run that ended; None for a verdict without an alert (`skipped`, `unchanged`).

    Args:
        summary: the summary of `report`; None if `report` itself failed.
    """
    if summary is None:
        error = {"what": "the report could not be made", "do": "See the log of the task report"}
        stages = {"report": {"state": "failed"}}
        summary = {"verdict": "failed", "stages": stages, "error": error, "report": ""}
    verdict, stages = summary["verdict"], summary["stages"]
    event, position = EVENTS.get(verdict), ""
    if event is None:
        return None
    if event == "published":
        subject = f"{recipe} published {summary['version']}"
        facts = {"result": stages["evaluate"]["summary"], "place": summary["place"]}
    else:
        position, _ = _position(stages)
        subject = f"{recipe} failed {position}" if event == "failed" else f"{recipe} {verdict}"
        error = summary["error"] or {"what": "the task was stopped or its worker was lost", "do": "See the task's log"}
        facts = {"reason": error["what"], "what to do": error["do"]}
        if event == "refused" and stages.get("evaluate", {}).get("summary"):
            facts["result"] = stages["evaluate"]["summary"]
    return _message(event, subject, facts, recipe, run_id, position, summary["report"])


def late(recipe: str, run: dict[str, Any], deadline: Any, records: dict[str, dict[str, Any]]) -> Message | None:
    """Return the message about a run that missed its deadline; None if the run ended in time.

    Args:
        run: the run as Airflow's REST API describes it.
        deadline: the time at which the run was due.
        records: the run's stage records in order.
    """
    due = _time(deadline)
    if run["end_date"] and _time(run["end_date"]) <= due:  # Airflow drops a deadline only if the run succeeded
        return None
    position, progress = _position(records)
    facts = {"reason": f"the run was due by {due:%Y-%m-%d %H:%M:%S} UTC"}
    if progress:
        facts["progress"] = progress
    facts["what to do"] = (
        "Check whether the run still makes progress. If it only needs more time, raise deadline_hours in the recipe"
    )
    return _message("late", f"{recipe} is late, {position}", facts, recipe, run["dag_run_id"], position)


def _message(
    event: str, subject: str, facts: dict[str, str], recipe: str, run_id: str, position: str, report: str = ""
) -> Message:
    short = {
        label: text if len(text) <= MAX_REASON_CHARS else text[:MAX_REASON_CHARS] + " ..."
        for label, text in facts.items()
        if text
    }
    stage, report = position.removeprefix("in "), report.removeprefix("file://")
    details = {"recipe": recipe, "stage": stage, "run": run_id, "report": report}
    known = {label: text for label, text in details.items() if text}
    return Message(event, f"Retune: {subject}", short, known, _link(recipe, run_id))


def _position(stages: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Return where a run is, or where it ended, in words (`in train`), and the last summary of that stage."""
    unfinished = [name for name in stages if stages[name]["state"] != "done"]
    name = next(iter(unfinished or [*stages][::-1]), None)
    if name is None:
        return "before its first stage", ""
    return f"{'in' if unfinished else 'after'} {name}", stages[name].get("summary") or ""


def _stage_records(recipe: str, run_id: str) -> dict[str, dict[str, Any]]:
    """Return the stage records of a run in the order in which the stages began; empty if the store cannot be read."""
    try:
        documents = Store().read_records(recipe, run_id)
    except Exception as error:  # of any kind: the message goes out without the records
        log.warning("the store cannot be read: %s", error)
        return {}
    records = {name: document for name, document in documents.items() if "started_at" in document}
    return dict(sorted(records.items(), key=lambda item: item[1]["started_at"]))


def _link(dag_id: str, run_id: str) -> str | None:
    address = conf.get("api", "base_url", fallback=None)
    if not address or os.environ.get(HEADLESS):
        return None
    return f"{address.rstrip('/')}/dags/{quote(dag_id)}/runs/{quote(run_id)}"


def _time(value: Any) -> datetime:
    return datetime.fromisoformat(str(value)).astimezone(UTC)

"""Tells people what became of a run, or that one is late: by the log, by mail and by Slack-compatible webhooks."""

from __future__ import annotations

import asyncio
import html
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import quote

from airflow.sdk import BaseNotifier
from airflow.sdk.configuration import conf
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from airflow.sdk.exceptions import AirflowNotFoundException
from tenacity import AsyncRetrying, Retrying, retry_if_exception_type, retry_if_not_exception_type
from tenacity.stop import stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from include.errors import PermanentError, TransientError
from include.paths import HEADLESS
from include.pipeline.records import log
from include.recipe import Recipe
from include.storage.artifacts import Store

SUMMARY = "summary"  # key of the XCom in which `report` leaves what it found
NOTIFIED = "told"  # key in the task's state: which channels know of which report
MAIL = "smtp_default"  # the connection
KINDS = {"published": "published", "refused": "refused", "rejected": "refused", "failed": "failed"}  # of a verdict
LEVELS = {"published": logging.INFO, "refused": logging.WARNING, "late": logging.WARNING, "failed": logging.ERROR}
MAX_REASON_CHARS = 1500  # characters of a reason; the report has all of it
TRIES = 3  # of one sending, seconds apart
TASK_RETRIES = 3  # times that what was not sent is tried again, some 20 s later, 40 s, 80 s
WEBHOOK_SECONDS = 10


@dataclass(frozen=True)
class Message:
    """One thing to tell, for a person who reads it on a telephone.

    Args:
        kind: what `alert_on` calls it.
        subject: recipe, what happened and in which stage.
        news: what a reader wants to know first, by label.
        where: what else helps to find the run, by label; mail only.
        link: address of the run in Airflow's UI; None where it has none.
    """

    kind: str
    subject: str
    news: dict[str, str]
    where: dict[str, str]
    link: str | None

    def text(self) -> str:
        """Plain text, aligned."""
        lines = [f"{label + ':':<12}{value}" for label, value in (self.news | self.where).items()]
        return "\n".join([self.subject, "", *lines, *(["", f"Open the run: {self.link}"] if self.link else []), ""])

    def html(self) -> str:
        """The same as a page without style sheets."""
        cell = '<td style="padding:2px 12px 2px 0;vertical-align:top'
        rows = "".join(
            f'<tr>{cell};color:#666">{html.escape(label)}</td>{cell}">{_linked(value)}</td></tr>'
            for label, value in (self.news | self.where).items()
        )
        link = f'<p><a href="{html.escape(self.link)}">Open the run</a></p>' if self.link else ""
        return f"<p><b>{html.escape(self.subject)}</b></p><table>{rows}</table>{link}"

    def slack(self) -> str:
        """Slack's mrkdwn, short."""
        lines = [f"{label}: {value}" for label, value in self.news.items()]
        said = "\n".join(_escaped(line) for line in lines)
        return f"*{_escaped(self.subject)}*\n{said}" + (f"\n<{self.link}|Open the run>" if self.link else "")


class Alert(BaseNotifier):
    """Tells all channels of a recipe; one that is broken does not keep the others from being told.

    With the context of a task it tells how the run ended; with that of a missed deadline, that it is late.

    Args:
        recipe: its name, which is the DAG's, too.
        on: what mail and webhooks are told, of `published`, `refused`, `failed` and `late`; the log is told all.
        mail: addresses.
        webhooks: names of connections.
        context: see `BaseNotifier`.
    """

    def __init__(self, recipe: str, on: list[str], mail: list[str], webhooks: list[str], context: Any = None):
        super().__init__(context=context)
        self.recipe, self.on, self.mail, self.webhooks = recipe, on, mail, webhooks
        self.told: list[str] = []  # the channels that have it

    @staticmethod
    def settings(recipe: Recipe) -> dict[str, Any]:
        """A recipe's arguments for this class, as plain JSON values."""
        return {"recipe": recipe.name, "on": recipe.alert_on, "mail": recipe.alert_mail,
                "webhooks": recipe.alert_webhooks}  # fmt: skip

    def notify(self, context: Any) -> None:
        """Tell each channel once; a second call, or a retry of the task, tells those that are left.

        Raises:
            TransientError: a channel did not take it.
            PermanentError: the connections of all that were not told are missing or incomplete.
        """
        if "deadline" in context:
            run = context["dag_run"]
            if message := late(
                self.recipe, run, context["deadline"]["deadline_time"], _records(self.recipe, run["dag_run_id"])
            ):
                self._tell(message, lambda: None)
            return
        summary = context["ti"].xcom_pull(task_ids="report", key=SUMMARY)
        if message := ended(self.recipe, context["run_id"], summary):
            store, of = context["task_state_store"], summary["finished_at"] if summary else ""
            known = store.get(NOTIFIED) or {}
            self.told = known["channels"] if known.get("of") == of else []
            self._tell(message, lambda: store.set(NOTIFIED, {"of": of, "channels": self.told}))
        else:
            log.info("%s: nobody is told", summary["verdict"])

    async def async_notify(self, context: Any) -> None:
        """The same in the triggerer, whose other triggers go on meanwhile; there it tries again by itself."""
        again = AsyncRetrying(
            retry=retry_if_exception_type(TransientError), stop=stop_after_attempt(TASK_RETRIES + 1),
            wait=wait_exponential_jitter(initial=20, max=600), reraise=True,
        )  # fmt: skip
        await again(asyncio.to_thread, self.notify, context)

    def _tell(self, message: Message, keep: Callable[[], None]) -> None:
        if not self.told:
            log.log(LEVELS[message.kind], "%s", message.text().rstrip())
        channels: dict[str, Callable[[], None]] = {}
        if message.kind in self.on:
            channels |= {f"mail to {address}": partial(_mail, message, address) for address in self.mail}
            channels |= {f"webhook {name}": partial(_post, message, name) for name in self.webhooks}
        lasting = True
        for channel in [channel for channel in channels if channel not in self.told]:
            try:
                _tries(channels[channel])
            except Exception as error:  # whatever it is, the other channels must be told
                lasting = lasting and isinstance(error, AirflowNotFoundException)
                log.warning("%s was not sent: %s", channel, error)
            else:
                log.info("%s was sent", channel)
                self.told.append(channel)
                keep()
        if missed := [channel for channel in channels if channel not in self.told]:
            kind = PermanentError if lasting else TransientError
            raise kind(
                f"not sent: {', '.join(missed)}",
                f"Look at these under Admin > Connections: mail goes through {MAIL}, a webhook's connection is of the "
                "type slackwebhook and has the whole address as its password",
            )


def deadline(recipe: Recipe) -> DeadlineAlert | None:
    """Airflow's part of `deadline_hours`: the triggerer calls `Alert` when a run has not ended in time."""
    if recipe.deadline_hours is None or os.environ.get(HEADLESS):  # `airflow dags test` cannot run a DAG that has one
        return None
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=recipe.deadline_hours),
        callback=AsyncCallback(Alert, kwargs=Alert.settings(recipe)),
    )


def ended(recipe: str, run_id: str, summary: dict[str, Any] | None) -> Message | None:
    """What there is to tell of a run that ended; None of one that nobody waits for.

    Args:
        summary: what `report` returned; None where it failed itself.
    """
    if summary is None:
        error = {"what": "the report could not be made", "do": "See the log of the task report"}
        stages = {"report": {"state": "failed"}}
        summary = {"verdict": "failed", "stages": stages, "error": error, "report": ""}
    verdict, stages = summary["verdict"], summary["stages"]
    kind, at = KINDS.get(verdict), ""
    if kind is None:
        return None
    if kind == "published":
        subject = f"{recipe} published {summary['version']}"
        news = {"result": stages["evaluate"]["summary"], "place": summary["place"]}
    else:
        at, _ = _at(stages)
        subject = f"{recipe} failed {at}" if kind == "failed" else f"{recipe} {verdict}"
        error = summary["error"] or {"what": "the task was stopped, or its worker was lost", "do": "See the task's log"}
        news = {"reason": error["what"], "what to do": error["do"]}
        if kind == "refused" and stages.get("evaluate", {}).get("summary"):
            news["result"] = stages["evaluate"]["summary"]
    return _message(kind, subject, news, recipe, run_id, at, summary["report"])


def late(recipe: str, run: dict[str, Any], deadline: Any, records: dict[str, dict[str, Any]]) -> Message | None:
    """What there is to tell of a run over its deadline; None where it ended in time.

    Args:
        run: as Airflow's REST API describes it.
        deadline: when it should have ended.
        records: of its stages, from the store.
    """
    by = _time(deadline)
    if run["end_date"] and _time(run["end_date"]) <= by:  # Airflow forgets a deadline only when the run succeeded
        return None
    at, line = _at(records)
    news = {"reason": f"it should have ended by {by:%Y-%m-%d %H:%M:%S} UTC"}
    if line:
        news["last seen"] = line
    news["what to do"] = "See whether it still goes on; raise deadline_hours in the recipe if it only takes long"
    return _message("late", f"{recipe} is late, {at}", news, recipe, run["dag_run_id"], at)


def _message(
    kind: str, subject: str, news: dict[str, str], recipe: str, run_id: str, at: str, report: str = ""
) -> Message:
    short = {
        label: text if len(text) <= MAX_REASON_CHARS else text[:MAX_REASON_CHARS] + " ..."
        for label, text in news.items()
        if text
    }
    where = {"recipe": recipe, "stage": at.removeprefix("in "), "run": run_id, "report": report.removeprefix("file://")}
    known = {label: text for label, text in where.items() if text}
    return Message(kind, f"Retune: {subject}", short, known, _link(recipe, run_id))


def _at(stages: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Where a run is or ended, in words, and what was said there last."""
    stuck = [name for name in stages if stages[name]["state"] != "done"]
    name = next(iter(stuck or [*stages][::-1]), None)
    if name is None:
        return "before its first stage", ""
    return f"{'in' if stuck else 'after'} {name}", stages[name].get("summary") or ""


def _records(recipe: str, run_id: str) -> dict[str, dict[str, Any]]:
    """The stages' records in the order in which they began; none where the store does not answer."""
    try:
        found = Store().records(recipe, run_id)
    except Exception as error:
        log.warning("the store was not read: %s", error)
        return {}
    stages = {name: record for name, record in found.items() if "started_at" in record}
    return dict(sorted(stages.items(), key=lambda item: item[1]["started_at"]))


def _link(dag: str, run_id: str) -> str | None:
    address = conf.get("api", "base_url", fallback=None)
    if not address or os.environ.get(HEADLESS):
        return None
    return f"{address.rstrip('/')}/dags/{quote(dag)}/runs/{quote(run_id)}"


def _time(value: Any) -> datetime:
    return datetime.fromisoformat(str(value)).astimezone(UTC)


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _linked(text: str) -> str:
    return re.sub(r"^(https?://\S+)$", r'<a href="\1">\1</a>', html.escape(text)).replace("\n", "<br>")


def _tries(send: Callable[[], None]) -> None:
    Retrying(
        retry=retry_if_not_exception_type(AirflowNotFoundException), stop=stop_after_attempt(TRIES),
        wait=wait_exponential_jitter(initial=1, max=10), reraise=True,
    )(send)  # fmt: skip


def _mail(message: Message, address: str) -> None:
    from email.mime.text import MIMEText

    from airflow.providers.smtp.hooks.smtp import SmtpHook
    from airflow.sdk import Connection

    class Hook(SmtpHook):
        """With the plain text in front of the HTML, which is all that the hook itself can send."""

        def _build_mime_message(self, *arguments: Any, **named: Any) -> Any:
            content, recipients = super()._build_mime_message(*arguments, **named)
            content.set_payload([MIMEText(message.text(), "plain", "utf-8"), *content.get_payload()])
            return content, recipients

    Connection.get(MAIL)  # the hook's own error does not say that it is missing
    with Hook(MAIL) as hook:
        hook.send_email_smtp(
            to=[address], subject=message.subject, html_content=message.html(), mime_subtype="alternative"
        )


def _post(message: Message, connection: str) -> None:
    from airflow.providers.slack.hooks.slack_webhook import SlackWebhookHook

    hook = SlackWebhookHook(slack_webhook_conn_id=connection, timeout=WEBHOOK_SECONDS)
    hook.send(text=message.slack(), unfurl_links=False)

"""Alerts: a real mail server, a real webhook server, and an Airflow in which runs succeed, fail and are late."""

from __future__ import annotations

import email
import email.policy
import json
import socket
import threading
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from include.recipe import validate_recipe
from plugins.alert_channels import CHANNELS
from plugins.alerts import Alert, ended, late
from tasks.stages import NAMES
from tests.conftest import last_run, reuse_training
from tests.services.airflow import SharedAirflow, eventually


class Mails:
    """A mail server's handler that keeps the messages; `connection` is what Airflow must know of the server."""

    def __init__(self, port: int) -> None:
        self.got: list[EmailMessage] = []
        extra = {"from_email": "retune@example.com", "disable_ssl": True, "disable_tls": True}
        self.connection = {"conn_type": "smtp", "host": "127.0.0.1", "port": port, "extra": json.dumps(extra)}

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.got.append(email.message_from_bytes(envelope.content, policy=email.policy.default))
        return "250 OK"

    def subjects(self) -> list[str]:
        return [message["Subject"] for message in self.got]

    def about(self, words: str) -> EmailMessage:
        return next(message for message in self.got if words in message["Subject"])


@pytest.fixture
def mails() -> Iterator[Mails]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mails = Mails(port)
    controller = Controller(mails, hostname="127.0.0.1", port=port)
    controller.start()
    yield mails
    controller.stop()


class Webhooks(ThreadingHTTPServer):
    """Keeps the texts posted to each path; answers 503 to the paths that are `down`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.got: dict[str, list[str]] = {"/team": [], "/flaky": []}
        self.down = {"/flaky"}


class _Hook(BaseHTTPRequestHandler):
    server: Webhooks

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        down = self.path in self.server.down
        if not down:
            self.server.got[self.path].append(body["text"])
        self.send_response(503 if down else 200)
        self.end_headers()
        self.wfile.write(b"no" if down else b"ok")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def webhooks() -> Iterator[Webhooks]:
    server = Webhooks()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.xdist_group("up")
def test_each_recipient_is_notified_once_of_the_end_of_a_run_and_of_its_lateness(
    shared: SharedAirflow, small_recipe: Callable, small_run: Path, trained: Path, mails: Mails, webhooks: Webhooks
) -> None:
    airflow, var = shared.api, shared.var
    reuse_training(small_run, var, "told")
    fields = {"alert_mail": ["ann@example.com"], "deadline_hours": 0.002}
    lost = {"dataset": "/nowhere/rows<1>.jsonl", "alert_webhooks": ["team"], "alert_on": ["failed"]}
    told = {"dataset": str(trained), "alert_webhooks": ["team", "flaky", "absent"]}
    airflow.call("POST", "/api/v2/connections", {"connection_id": "smtp_default", **mails.connection})
    for name in ("team", "flaky"):
        hook = {"connection_id": name, "conn_type": "slackwebhook", "password": f"{webhooks.url}/{name}"}
        airflow.call("POST", "/api/v2/connections", hook)
    shared.add(small_recipe("gone", **fields, **lost), small_recipe("told", **fields, **told))
    assert airflow.call("GET", "/api/v2/importErrors")["total_entries"] == 0

    def start(dag: str, **conf: Any) -> str:
        run = airflow.call("POST", f"/api/v2/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})
        return f"/api/v2/dags/{dag}/dagRuns/{run['dag_run_id']}"

    def end(run: str) -> str:
        return eventually(lambda: {"success", "failed"} & {airflow.call("GET", run)["state"]}).pop()

    def state(run: str, task: str) -> str:
        return airflow.call("GET", f"{run}/taskInstances/{task}")["state"]

    # one that fails at once
    failing, good = start("gone"), start("told")
    assert end(failing) == "failed"
    assert mails.subjects().count("Retune: gone failed in resolve") == 1
    mail = mails.about("gone failed")
    assert (mail["To"], mail["From"]) == ("ann@example.com", "retune@example.com")
    text, page = mail.get_body(("plain",)).get_content(), mail.get_body(("html",)).get_content()
    assert "there is no file /nowhere/rows<1>.jsonl" in text
    assert "/nowhere/rows&lt;1&gt;.jsonl" in page
    link = f"{airflow.url}/dags/gone/runs/manual__"
    assert link in text and link in page and str(var / "store" / "gone" / "runs") in text
    (post,) = (post for post in webhooks.got["/team"] if "gone" in post)
    assert post.startswith("*Retune: gone failed in resolve*")
    assert "/nowhere/rows&lt;1&gt;.jsonl" in post and f"<{link}" in post
    assert state(failing, "alert") == "success"

    # one that is late, and is published, with a webhook that is down and one that is not there: until the test
    # lets that webhook work, the run does not end
    eventually(lambda: "Retune: told published v1" in mails.subjects())
    eventually(lambda: len(webhooks.got["/team"]) == 3)
    eventually(lambda: state(good, "alert") == "up_for_retry")
    webhooks.down.clear()
    assert end(good) == "success", "an alert that fails is no failure of the run"
    assert state(good, "alert") == "failed", "but the UI shows it"
    tries = airflow.call("GET", f"{good}/taskInstances/alert")["try_number"]
    logs = [airflow.call("GET", f"{good}/taskInstances/alert/logs/{number}") for number in range(2, tries + 1)]
    said = str([log["content"] for log in logs])
    assert "webhook flaky was sent" in said and "mail to" not in said
    assert "webhook absent was not sent: The conn_id `absent` isn't defined" in said
    assert "alert failed: not sent: webhook absent. Check the connections under Admin > Connections" in said
    summary = last_run(var)
    news = mails.about("told published").get_body(("plain",)).get_content()
    assert summary["stages"]["evaluate"]["summary"] in news and summary["place"] in news
    assert len([post for post in webhooks.got["/flaky"] if post.startswith("*Retune: told published v1*")]) == 1
    assert mails.subjects().count("Retune: told published v1") == 1
    (news,) = (mail for mail in mails.got if "told is late" in mail["Subject"])
    assert news["Subject"].endswith((*NAMES, "before its first stage")), "which stage it is, depends on the machine"
    assert "the run was due by 20" in news.get_body(("plain",)).get_content()

    # a skipped run sends no alert
    assert end(start("told")) == "success"
    assert last_run(var)["verdict"] == "skipped"
    ends = [subject for subject in mails.subjects() if "late" not in subject]
    assert ends == ["Retune: gone failed in resolve", "Retune: told published v1"]


def test_a_headless_run_without_its_data_fails_at_once_and_its_alert_names_the_report(
    var: Path, airflow_home: Path, small_recipe: Callable, mails: Mails, retune: Callable
) -> None:
    small_recipe(dataset="/nowhere/rows.jsonl", deadline_hours=0.0003, alert_mail=["ann@example.com"])
    done = retune("run", "small", AIRFLOW_CONN_SMTP_DEFAULT=json.dumps(mails.connection))
    assert done.returncode == 1
    assert "Failed after" in done.stdout
    assert done.stdout.count("field 'dataset': there is no file /nowhere/rows.jsonl") == 2, "the stage and the end"
    summary = last_run(var)
    assert (summary["verdict"], summary["error"]["kind"], [*summary["stages"]]) == ("failed", "NotFound", ["resolve"])
    (mail,) = mails.got
    text = mail.get_body(("plain",)).get_content()
    assert mail["Subject"] == "Retune: small failed in resolve"
    assert summary["report"].removeprefix("file://") in text
    assert "http" not in text, "there is no UI to look at"


def test_a_run_that_failed_before_its_deadline_is_not_late() -> None:
    run = {"dag_run_id": "run", "end_date": "2026-01-01T10:00:00Z"}
    assert late("small", run, "2026-01-01T10:00:01+00:00", {}) is None
    assert (
        late("small", run, "2026-01-01T09:59:59+00:00", {}).subject == "Retune: small is late, before its first stage"
    )


def test_a_late_alert_says_where_the_run_is() -> None:
    run = {"dag_run_id": "run", "end_date": None}
    records: dict[str, Any] = {"download": {"state": "done", "summary": "60 rows"}}
    assert late("small", run, "2026-01-01T10:00:00Z", records).subject == "Retune: small is late, after download"
    records["train"] = {"state": "running", "summary": "step 5/60"}
    message = late("small", run, "2026-01-01T10:00:00Z", records)
    assert message.subject == "Retune: small is late, in train"
    assert message.summary["progress"] == "step 5/60"


def test_an_unchanged_run_sends_no_alert_and_a_failed_report_does() -> None:
    assert ended("small", "run", {"verdict": "unchanged", "stages": {}}) is None
    message = ended("small", "run", None)
    assert (message.event, message.subject) == ("failed", "Retune: small failed in report")


def test_a_refusal_comes_with_its_numbers() -> None:
    stages = {
        "train": {"state": "done", "summary": "60 steps"},
        "evaluate": {"state": "done", "summary": "loss 2 -> 1"},
        "publish": {"state": "failed", "summary": "not better"},
    }
    summary = {"verdict": "refused", "stages": stages, "report": "r", "error": {"what": "not better", "do": "Train on"}}
    message = ended("small", "run", summary)
    assert (message.subject, message.details["stage"]) == ("Retune: small refused", "publish")
    assert message.summary == {"reason": "not better", "what to do": "Train on", "result": "loss 2 -> 1"}


def test_slack_reads_no_markup_out_of_a_reason() -> None:
    error = {"what": "<!channel> & <http://evil|this>" + "x" * 2000, "do": ""}
    stages = {"train": {"state": "failed", "summary": ""}}
    text = ended("small", "run", {"verdict": "failed", "stages": stages, "error": error, "report": "r"}).slack()
    assert "reason: &lt;!channel&gt; &amp; &lt;http://evil|this&gt;" in text
    assert len(text) < 1700


def test_every_channel_takes_its_recipients_from_the_recipe() -> None:
    recipe = validate_recipe({"name": "small", "alert_mail": ["ann@example.com"], "alert_webhooks": ["team"]}, "here")
    recipients = Alert.settings(recipe)["recipients"]
    given = {name: entries for name, entries in recipients.items() if entries}
    assert given == {"alert_mail": ["ann@example.com"], "alert_webhooks": ["team"]}
    assert [*recipients] == [channel.recipe_field for channel in CHANNELS]
    assert {name for name in type(recipe).model_fields if name.startswith("alert_")} == {"alert_on", *recipients}

"""What the DAGs share: when Airflow tries again and what a failure's last words are, and the account on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlsplit

from airflow.sdk import Connection, ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowNotFoundException, AirflowTaskTimeout
from airflow.sdk.log import mask_secret

from include.errors import Overtaken, PermanentError, ProcessLost, Rejected, RetuneError, TransientError, Unanswered
from include.hub import CONNECTION
from include.stage import log

NOTE = "note"  # key of the XCom that becomes the run's note
POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(Rejected, RetryAction.FAIL, reason="a person has decided"),
        RetryRule(Unanswered, RetryAction.FAIL, reason="a new run, or clearing it, asks again"),
        RetryRule(PermanentError, RetryAction.FAIL, reason="a retry would fail in the same way"),
        RetryRule(Overtaken, RetryAction.FAIL, reason="an earlier stage must look again"),
        RetryRule(ProcessLost, RetryAction.RETRY, timedelta(seconds=5), "it goes on from what was saved"),
        RetryRule(TransientError, RetryAction.RETRY, reason="the next try may succeed"),
        RetryRule(AirflowTaskTimeout, RetryAction.RETRY, reason="it may have hung"),
    ]
)

REPORTS = "/retune"  # where plugins/report_page.py serves runs' reports, below the API server's address


def report_address(dag_id: str, run_id: str) -> str:
    """The address of a run's report page, without the host: people may come to the server under several names."""
    below = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
    return f"{below}{REPORTS}/report/{quote(dag_id, safe='{}')}/{quote(run_id, safe='{}')}"


def explain(context: Any) -> None:
    """The last words of a failed try: what failed, why, what to do, and whether it will be tried again."""
    ti, error = context["ti"], context.get("exception")
    what, do = f"{type(error).__name__}: {error}", "See the log above"
    if isinstance(error, RetuneError):
        what, do = error.what, error.do
    elif isinstance(error, AirflowTaskTimeout):
        what, do = "it took longer than its timeout", "Raise timeout_hours in the recipe if it only takes long"
    reason = POLICY.evaluate(error, ti.try_number, ti.max_tries).reason or "its cause is not known to be lasting"
    if ti.state == "up_for_retry":
        then = f"It will be tried again, {reason} (try {ti.try_number + 1} of {ti.max_tries + 1})"
    elif ti.try_number > ti.max_tries:
        then = f"It will not be tried again: all {ti.max_tries + 1} tries are used up"
    else:
        then = f"It will not be tried again: {reason}"
    log.info("::endgroup::")  # Airflow folds what comes after a failure
    log.error("%s failed: %s. %s. %s.", ti.task_id, what, do or "The report has the details", then)


RETRIES = {
    "retries": 6,
    "retry_delay": timedelta(seconds=20),  # then 40, 80 ... and each up to twice as long, by Airflow's jitter
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(hours=1),
    "retry_policy": POLICY,
    "on_retry_callback": explain,
    "on_failure_callback": explain,
}


@contextmanager
def hub_account() -> Iterator[None]:
    """The token (and the address, if set) of the connection `huggingface_default` in this process's environment.

    Without such a connection the environment stays as it is. The stages and their subprocesses read it there and
    nowhere else.
    """
    values: dict[str, str] = {}
    try:
        connection = Connection.get(CONNECTION)
        values = {"HF_TOKEN": (connection.password or "").strip(), "HF_ENDPOINT": _address(connection)}
    except AirflowNotFoundException:
        pass
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value})
    if token := os.environ.get("HF_TOKEN"):
        mask_secret(token)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _address(connection: Connection) -> str:
    host, port = connection.host or "", f":{connection.port}" if connection.port else ""
    return f"{host if not host or '://' in host else f'https://{host}'}{port if host else ''}"

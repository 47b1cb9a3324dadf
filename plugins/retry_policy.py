"""Retries by cause, and the last log line of a failed try."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule
from airflow.sdk.exceptions import AirflowTaskTimeout

from include.errors import ApprovalTimeout, Conflict, PermanentError, ProcessLost, Rejected, RetuneError, TransientError
from include.pipeline.records import log

POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(Rejected, RetryAction.FAIL, reason="a person has decided"),
        RetryRule(ApprovalTimeout, RetryAction.FAIL, reason="a new run asks again, and so does clearing the task"),
        RetryRule(PermanentError, RetryAction.FAIL, reason="a retry would fail in the same way"),
        RetryRule(Conflict, RetryAction.FAIL, reason="an earlier stage must run again"),
        RetryRule(ProcessLost, RetryAction.RETRY, timedelta(seconds=5), "training continues from the last checkpoint"),
        RetryRule(TransientError, RetryAction.RETRY, reason="the next try may succeed"),
        RetryRule(AirflowTaskTimeout, RetryAction.RETRY, reason="the process may have hung"),
    ]
)


def explain(context: Any) -> None:
    """Log the last line of a failed try: what failed, why, what to do, and whether Airflow retries."""
    ti, error = context["ti"], context.get("exception")
    what, do = f"{type(error).__name__}: {error}", "See the log above"
    if isinstance(error, RetuneError):
        what, do = error.what, error.do
    elif isinstance(error, AirflowTaskTimeout):
        what, do = "it took longer than its timeout", "If it only needs more time, raise timeout_hours in the recipe"
    reason = POLICY.evaluate(error, ti.try_number, ti.max_tries).reason or "the cause may be temporary"
    if ti.state == "up_for_retry":
        then = f"It will be tried again: {reason} (try {ti.try_number + 1} of {ti.max_tries + 1})"
    elif ti.try_number > ti.max_tries:
        then = f"It will not be tried again: all {ti.max_tries + 1} tries are used up"
    else:
        then = f"It will not be tried again: {reason}"
    log.info("::endgroup::")  # Airflow folds the lines after a failure
    log.error("%s failed: %s. %s. %s.", ti.task_id, what, do or "The report has the details", then)


RETRIES = {
    "retries": 6,
    "retry_delay": timedelta(seconds=20),  # then 40, 80 ...; Airflow's jitter makes each up to twice as long
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(hours=1),
    "retry_policy": POLICY,
    "on_retry_callback": explain,
    "on_failure_callback": explain,
}

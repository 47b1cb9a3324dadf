"""When Airflow tries a task again: the cause decides, for every class of error."""

from __future__ import annotations

import inspect

import pytest
from airflow.sdk import RetryAction
from airflow.sdk.exceptions import AirflowTaskTimeout

from include import errors
from include.errors import RetuneError
from plugins.retry_policy import POLICY, RETRIES

FAIL, RETRY, DEFAULT = RetryAction.FAIL, RetryAction.RETRY, RetryAction.DEFAULT
ACTIONS = {
    "RetuneError": DEFAULT,  # its cause is not known: it is tried again like any exception
    "PermanentError": FAIL,
    "BadRecipe": FAIL,
    "TooCostly": FAIL,  # the template would cost as much again
    "BadData": FAIL,
    "NotFound": FAIL,
    "NoPermission": FAIL,
    "GateRefused": FAIL,
    "Rejected": FAIL,
    "ApprovalTimeout": FAIL,
    "Conflict": FAIL,
    "Damaged": FAIL,  # the stage that made the artifact must run again
    "UpToDate": DEFAULT,  # a skip, which never reaches the policy
    "TransientError": RETRY,
    "Unreachable": RETRY,
    "NoSpace": RETRY,
    "ProcessLost": RETRY,
    "ProcessTimeout": RETRY,
    "OutOfMemory": RETRY,
    "UndeclaredField": FAIL,
}
CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RetuneError)]


def test_the_table_has_every_class_of_error() -> None:
    assert {kind.__name__ for kind in CLASSES} == ACTIONS.keys()


@pytest.mark.parametrize("kind", CLASSES)
def test_the_cause_decides_about_a_retry(kind: type[RetuneError]) -> None:
    decision = POLICY.evaluate(kind("what", "do"), try_number=1, max_tries=6)
    assert decision.action == ACTIONS[kind.__name__]
    assert bool(decision.reason) == (decision.action != DEFAULT), "the log says why"


def test_a_lost_process_is_started_again_at_once_and_other_causes_get_time() -> None:
    for kind in (errors.ProcessLost, errors.ProcessTimeout, errors.OutOfMemory):
        decision = POLICY.evaluate(kind("what"), try_number=1, max_tries=6)
        assert decision.retry_delay is not None and decision.retry_delay < RETRIES["retry_delay"]
    assert POLICY.evaluate(errors.Unreachable("what"), try_number=1, max_tries=6).retry_delay is None


def test_a_try_that_took_too_long_is_repeated_and_an_unknown_exception_is_left_to_airflow() -> None:
    assert POLICY.evaluate(AirflowTaskTimeout(), try_number=1, max_tries=6).action == RETRY
    assert POLICY.evaluate(ValueError("what"), try_number=1, max_tries=6).action == DEFAULT

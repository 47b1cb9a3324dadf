"""The Hugging Face Hub's client: a timeout for every call, errors that name the recipe's field, and retries."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from include.errors import NoPermission, NotFound, PermanentError, RetuneError, Unreachable

log = logging.getLogger("airflow.task.retune")

CONNECTION = "huggingface_default"  # the Airflow connection whose password is the token
TIMEOUT = 60.0  # seconds without an answer; huggingface_hub has no timeout for most calls
RETRYABLE_STATUS = (408, 409, 412, 425, 429)  # besides 5xx: caused by a state that may have changed at the next call
MAX_TRIES = 7  # with pauses of 0.5, 1, 2 ... 16 seconds, or the pause that the Hub asks for
MAX_PAUSE = 300.0  # seconds

Method = TypeVar("Method", bound=Callable[..., Any])


def hub_api() -> Any:
    """Return huggingface_hub's client for the Hub that the environment names (`HF_ENDPOINT`, `HF_TOKEN`)."""
    from huggingface_hub import HfApi

    _set_timeout()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def hub_file_system() -> Any:
    """Return huggingface_hub's file system, for parts of large files; paths are `owner/name@revision/file`."""
    from huggingface_hub import HfFileSystem

    _set_timeout()
    return HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT") or None)


@functools.cache
def _set_timeout() -> None:
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", TIMEOUT))

    def client() -> httpx.Client:
        result = default_client_factory()
        result.timeout = httpx.Timeout(seconds)
        return result

    set_client_factory(client)


@contextmanager
def hub_errors(what: str, field: str, write: bool = False) -> Iterator[None]:
    """Translate the errors of huggingface_hub into errors about the recipe's field.

    Args:
        what: the repository, file or dataset, for the message.
        field: the recipe's field that names it.
        write: whether the calls write to it.

    Raises:
        NotFound, NoPermission, PermanentError: a retry would fail in the same way.
        Unreachable: the Hub did not answer, or asked to try again later.
    """
    _set_timeout()
    try:
        yield
    except RetuneError:
        raise
    except Exception as error:
        for cause in _causes(error):
            if translated := _translate(cause, what, field, write):
                raise translated from cause
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, outermost first: the client and `datasets` wrap the Hub's answers."""
    from huggingface_hub import errors

    current: BaseException | None = error
    while current:
        cause = current.__cause__ or current.__context__
        # the Hub's answer says more than the error that the file is not in the local cache
        if not (isinstance(current, errors.LocalEntryNotFoundError) and isinstance(cause, errors.HfHubHTTPError)):
            yield current
        current = cause


def _translate(error: BaseException, what: str, field: str, write: bool) -> RetuneError | None:
    import httpx
    from huggingface_hub import errors

    where, message = f"field '{field}': ", " ".join(str(error).split())
    if isinstance(error, errors.HFValidationError):
        return NotFound(f"{where}{what} cannot be on the Hub: {message}", "Correct the name")
    if isinstance(error, (UnicodeEncodeError, httpx.LocalProtocolError)):  # a header with such a character
        return NoPermission("the token for the Hub has a character that no token has", _token(write))
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return PermanentError(
            f"HF_ENDPOINT is no address of a Hub: {hub_api().endpoint} ({message})", "Write it as https://host"
        )
    if isinstance(error, errors.GatedRepoError):
        return NoPermission(
            f"{where}{what} is gated", f"Accept its terms on the Hub with the account of your token ({CONNECTION})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(f"{where}{what} has no such revision", "Correct the revision, or leave it empty")
    if isinstance(error, errors.RepositoryNotFoundError) and not write:
        return NotFound(
            f"{where}{what} is not on the Hub, or is private", f"Check the name; if it is private: {_token()}"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return NotFound(f"{where}{what} does not exist: {_answer(error)}", "Correct the path, or the revision")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            return no_permission(what, field, write)
        if status >= 500 or status in RETRYABLE_STATUS:
            return Unreachable(f"the Hub answered {status} for {what}", "Retry the task later")
        return PermanentError(
            f"{where}the Hub refused {what} ({status}): {_answer(error)}", "Correct what the answer names"
        )
    if isinstance(error, json.JSONDecodeError):
        return Unreachable(f"the Hub's answer for {what} was incomplete or is no JSON", "Retry the task later")
    connection_errors = (httpx.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError)
    incomplete = isinstance(error, OSError) and str(error).startswith("Consistency check failed")  # a download's size
    if incomplete or isinstance(error, (*connection_errors, errors.FileMetadataError, errors.RevisionResolutionError)):
        return Unreachable(
            f"{where}{what} needs the Hub, and {hub_api().endpoint} cannot be reached ({message})",
            "Check the network or HF_ENDPOINT; to work without a network, name a local file or folder",
        )
    return None


def _answer(error: Any) -> str:
    return " ".join((error.server_message or str(error)).split())


def no_permission(what: str, field: str, write: bool) -> NoPermission:
    """Return the error for a token that is missing or not sufficient; the message never contains the token."""
    from huggingface_hub import get_token

    reason = "the token that was given does not allow it" if get_token() else "there is no token"
    return NoPermission(
        f"field '{field}': the Hub does not let Retune {'write to' if write else 'read'} {what}: {reason}",
        _token(write),
    )


def _token(write: bool = False) -> str:
    kind = (
        "a token of the type Write, or a fine-grained one with write access to the contents of that repository,"
        if write
        else "a token that may read it"
    )
    return f"Put {kind} into the password of the Airflow connection {CONNECTION}, or into HF_TOKEN"


def retry_on_unreachable(method: Method) -> Method:
    """Call a method again, after a growing pause, while it raises Unreachable, at most `MAX_TRIES` times in all.

    If the Hub asks for a pause, that one is used. The method must read the state of the Hub anew at each call.
    """

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        tries = Retrying(
            retry=retry_if_exception_type(Unreachable),
            stop=stop_after_attempt(MAX_TRIES),
            wait=_pause,
            before_sleep=_log_retry,
            reraise=True,
        )
        return tries(method, *arguments, **named)

    return call  # type: ignore[return-value]


_backoff = wait_exponential_jitter(multiplier=0.5, max=30, jitter=0.5)


def _pause(state: RetryCallState) -> float:
    requested = _requested_pause(state)
    return min(_backoff(state) if requested is None else requested, MAX_PAUSE)


def _requested_pause(state: RetryCallState) -> float | None:
    """Return the seconds that the Hub asks for in `Retry-After` or in its rate limit's headers, or None."""
    from huggingface_hub.utils import parse_ratelimit_headers

    error = state.outcome.exception() if state.outcome else None
    headers = getattr(getattr(error and error.__cause__, "response", None), "headers", {})
    if headers.get("Retry-After", "").isdigit():
        return float(headers["Retry-After"])
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("%s; try %d of %d in %.1f s", getattr(error, "what", error), state.attempt_number + 1, MAX_TRIES,
                state.upcoming_sleep)  # fmt: skip

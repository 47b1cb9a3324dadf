"""The Hugging Face Hub as a service: a client that does not wait for ever, errors for people, retries with back-off."""

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
TIMEOUT = 60.0  # seconds of silence; huggingface_hub itself waits for ever on most calls
PASSING = (408, 409, 412, 425, 429)  # besides 5xx: the state of the moment, which the next look may find changed
TRIES = 7  # pauses of 0.5, 1, 2 ... 16 seconds between them, or what the Hub asks for
LONGEST_PAUSE = 300.0

Method = TypeVar("Method", bound=Callable[..., Any])


def hub_api() -> Any:
    """huggingface_hub's client for the Hub of the environment (`HF_ENDPOINT`, `HF_TOKEN`)."""
    from huggingface_hub import HfApi

    _never_wait_for_ever()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


@functools.cache
def _never_wait_for_ever() -> None:
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    seconds = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", TIMEOUT))

    def client() -> httpx.Client:
        made = default_client_factory()
        made.timeout = httpx.Timeout(seconds)
        return made

    set_client_factory(client)


@contextmanager
def hub_errors(what: str, field: str, write: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence about the field that asked for it.

    Args:
        what: what is read or written, for people.
        field: the recipe's field that names it.
        write: whether it is to be written.

    Raises:
        NotFound, NoPermission, PermanentError: a retry would not help.
        Unreachable: the Hub did not answer, or asked for patience.
    """
    _never_wait_for_ever()
    try:
        yield
    except RetuneError:
        raise
    except Exception as error:
        for cause in _causes(error):
            if problem := _in_words(cause, what, field, write):
                raise problem from cause
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, outermost first: the client and `datasets` wrap the Hub's answers."""
    from huggingface_hub import errors

    link: BaseException | None = error
    while link:
        inner = link.__cause__ or link.__context__
        # that a file is not at hand says less than the answer because of which it is not
        if not (isinstance(link, errors.LocalEntryNotFoundError) and isinstance(inner, errors.HfHubHTTPError)):
            yield link
        link = inner


def _in_words(error: BaseException, what: str, field: str, write: bool) -> RetuneError | None:
    import httpx
    from huggingface_hub import errors

    where = f"field '{field}': "
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
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            return no_permission(what, field, write)
        if status >= 500 or status in PASSING:
            return Unreachable(f"the Hub answered {status} for {what}", "Retry the task in a while")
        said = " ".join((error.server_message or str(error)).split())
        return PermanentError(f"{where}the Hub refused {what} ({status}): {said}", "Correct what it names")
    if isinstance(error, json.JSONDecodeError):
        return Unreachable(f"the Hub's answer for {what} was cut or no JSON", "Retry the task in a while")
    lost = (httpx.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError)
    cut = isinstance(error, OSError) and str(error).startswith("Consistency check failed")  # a download's size
    if cut or isinstance(error, (*lost, errors.FileMetadataError, errors.RevisionResolutionError)):
        return Unreachable(
            f"{where}{what} needs the Hub, and {hub_api().endpoint} cannot be reached",
            "Check the network or HF_ENDPOINT; to work without a network, name a local file or folder",
        )
    return None


def no_permission(what: str, field: str, write: bool) -> NoPermission:
    """The error for a token that is missing or does not suffice; it never says the token."""
    from huggingface_hub import get_token

    found = "the token that was given does not allow it" if get_token() else "there is no token"
    return NoPermission(
        f"field '{field}': the Hub does not let Retune {'write to' if write else 'read'} {what}: {found}", _token(write)
    )


def _token(write: bool = False) -> str:
    kind = (
        "a token of the type Write, or a fine-grained one with write access to the contents of that repository,"
        if write
        else "a token that may read it"
    )
    return f"Put {kind} into the password of the Airflow connection {CONNECTION}, or into HF_TOKEN"


def retry_on_unreachable(method: Method) -> Method:
    """Calls the method again, after a growing pause, for as long as it raises Unreachable; each call looks anew.

    The pause is the one that the Hub asks for, where it does.
    """

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        tries = Retrying(
            retry=retry_if_exception_type(Unreachable),
            stop=stop_after_attempt(TRIES),
            wait=_pause,
            before_sleep=_say,
            reraise=True,
        )
        return tries(method, *arguments, **named)

    return call  # type: ignore[return-value]


_backing_off = wait_exponential_jitter(multiplier=0.5, max=30, jitter=0.5)


def _pause(state: RetryCallState) -> float:
    asked = _asked_for(state)
    return min(_backing_off(state) if asked is None else asked, LONGEST_PAUSE)


def _asked_for(state: RetryCallState) -> float | None:
    """Seconds that the Hub asks for in `Retry-After` or in its rate limit's headers."""
    from huggingface_hub.utils import parse_ratelimit_headers

    error = state.outcome.exception() if state.outcome else None
    headers = getattr(getattr(error and error.__cause__, "response", None), "headers", {})
    if headers.get("Retry-After", "").isdigit():
        return float(headers["Retry-After"])
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def _say(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("%s; try %d of %d in %.1f s", getattr(error, "what", error), state.attempt_number + 1, TRIES,
                state.upcoming_sleep)  # fmt: skip

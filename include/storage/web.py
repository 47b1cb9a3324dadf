"""Files at http addresses: fsspec's file system for them, and its errors as Retune's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from include.errors import NoPermission, NotFound, PermanentError, RetuneError, Unreachable
from include.storage.hub import RETRYABLE_STATUS

SECONDS = 60.0  # without an answer, or without a byte of it
GONE = (404, 410)
SCHEMES = ("http://", "https://")


def web_options() -> dict[str, Any]:
    """Return the options of fsspec's file system for http addresses.

    aiohttp's own limit, five minutes for a whole file, is too short for a large one.
    """
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS, sock_read=SECONDS)
    return {"client_kwargs": {"timeout": limits, "trust_env": True}}


@contextmanager
def web_errors(address: str, field: str) -> Iterator[None]:
    """Translate the errors of aiohttp, of which fsspec makes a FileNotFoundError in most cases.

    Args:
        address: for the message.
        field: the recipe's field that names it.

    Raises:
        NotFound: the server has no such file.
        NoPermission: the server wants a login (401), or forbids the access (403).
        PermanentError: the address is no address, the server's certificate is not valid, or it refuses the request.
        Unreachable: the server does not answer, breaks off, or says that it cannot answer now (5xx, 408, 429 ...).
    """
    try:
        yield
    except RetuneError:
        raise
    except Exception as error:
        for cause in _causes(error):
            if translated := _translate(cause, address, field):
                raise translated from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current:
        yield current
        current = current.__cause__


def _translate(error: BaseException, address: str, field: str) -> RetuneError | None:
    import aiohttp

    what, message = f"field '{field}': {address}", " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, aiohttp.TooManyRedirects):
        return PermanentError(f"{what} leads from one address to the next without an end", "Correct the address")
    if isinstance(error, aiohttp.ClientResponseError):
        answer = f"the server answered {error.status} {error.message}".rstrip()
        if error.status in GONE:
            return NotFound(f"field '{field}': there is no file {address}: {answer}", "Correct the address")
        if error.status in (401, 403):
            return NoPermission(
                f"{what} may not be read: {answer}",
                "Allow the access, renew a signed address, or copy the file to a place that the workers may read",
            )
        if error.status >= 500 or error.status in (*RETRYABLE_STATUS, 416):  # 416: the file became shorter meanwhile
            return Unreachable(f"{what} cannot be fetched now: {answer}", "Retry the task later")
        return PermanentError(f"{what} cannot be fetched: {answer}", "Correct the address")
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
        return NotFound(f"{what} is not a valid address ({message})", "Correct the address")
    if isinstance(error, aiohttp.ClientSSLError):
        return PermanentError(
            f"{what}: the connection is not secure ({message})", "Correct the server's certificate, or the address"
        )
    if isinstance(error, (aiohttp.ClientError, TimeoutError, ConnectionError)):
        if isinstance(error, TimeoutError) and not str(error):
            message = f"no answer within {SECONDS:g} s"
        return Unreachable(f"{what} cannot be reached: {message}", "Check the address and the network")
    return None

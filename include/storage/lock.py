"""A lock for object stores, which have none: a lease is an object that its owner rewrites while the owner lives."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fsspec.asyn import sync
from upath import UPath

from include.errors import TransientError
from include.storage.object_store import list_dir, log, read_all


class Lease:
    """The right of one process to change a folder; `lock` grants it.

    Args:
        path: the lease's own object.
        ttl: seconds after its last renewal for which other processes respect the lease.
    """

    def __init__(self, path: UPath, ttl: float):
        self.path, self.ttl = path, ttl
        self._renewals, self._renewed_at = 0, 0.0
        self._stop_heartbeat = threading.Event()

    def renew(self) -> None:
        """Write the lease with another content than before."""
        started = time.monotonic()
        self._renewals += 1
        self._put(self.path, f"{socket.gethostname()} {os.getpid()} {self._renewals}".encode())
        self._renewed_at = started

    def release(self) -> None:
        """Remove the lease. If that fails, the lease expires after `ttl`."""
        with suppress(Exception):
            self.path.fs.rm_file(self.path.path)

    def write(self, path: UPath, content: bytes) -> None:
        """Write a small object while the lease is valid, and never after it may have expired.

        Raises:
            TransientError: the lease could not be renewed in time.
        """
        self.check()
        self._put(path, content)

    def check(self) -> None:
        """Raise an error if the last renewal is older than half of `ttl`.

        A write that starts now takes at most a third of `ttl` (see `_put`), so that it ends before other processes may
        treat the lease as expired.

        Raises:
            TransientError: the lease could not be renewed in time.
        """
        if time.monotonic() - self._renewed_at > self.ttl / 2:
            raise TransientError(
                f"the lock on {self.path.parent.parent} could not be renewed for {self.ttl / 2:g} s",
                "Retry the task: files that are already there are not written again",
            )

    def _put(self, path: UPath, content: bytes) -> None:
        fs = path.fs
        if fs.async_impl:  # a request that hangs must not arrive after the lease has expired
            sync(fs.loop, fs._pipe_file, path.path, content, timeout=self.ttl / 3)
        else:
            fs.pipe_file(path.path, content)

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Renew the lease in the background for as long as the context is open."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop_heartbeat.set()
            thread.join()

    def _beat(self) -> None:
        while not self._stop_heartbeat.wait(self.ttl / 6):
            with suppress(Exception):  # the next renewal may succeed; `check` compares the time
                self.check()
                self.renew()


@contextmanager
def lock(folder: UPath, ttl: float = 60.0, timeout: float = 900.0) -> Iterator[Lease]:
    """Wait until no other process has a lease in a folder, and hold one there.

    A process that lists no lease writes its own and lists again: of two processes, the one that wrote later sees the
    lease of the other. If it sees one, it removes its own lease and tries again after a random pause. A lease whose
    content has not changed for `ttl` has expired. Clocks of machines are not compared.

    Args:
        folder: holds leases only.
        ttl: seconds; the same for all processes that use the folder.
        timeout: seconds to wait for other processes that are alive.

    Raises:
        TransientError: other processes held the lock all the time.
    """
    lease = Lease(folder / uuid.uuid4().hex, ttl)
    observed: dict[UPath, tuple[bytes, float]] = {}
    started, pause = time.monotonic(), 0.1
    try:
        while True:
            owners = _other_owners(folder, lease, observed)
            if not owners:
                lease.renew()
                owners = _other_owners(folder, lease, observed)
                if not owners:
                    break
                lease.release()
            if time.monotonic() - started > timeout:
                raise TransientError(
                    f"{folder.parent} was locked by {', '.join(owners)} for {timeout:g} s", "Retry the task"
                )
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, ttl / 12)
        with lease.heartbeat():
            yield lease
    finally:
        lease.release()


def _other_owners(folder: UPath, own: Lease, observed: dict[UPath, tuple[bytes, float]]) -> list[str]:
    """Return machine and process of each other lease that has not expired, and remove the expired ones.

    Args:
        observed: the content of each lease and the time at which this process first read it; updated by each call.
    """
    listed_at = time.monotonic()
    contents = read_all(folder / name for name in list_dir(folder) if name != own.path.name)
    for released in observed.keys() - contents.keys():
        del observed[released]
    owners = []
    for path, content in contents.items():
        if path not in observed or observed[path][0] != content:
            observed[path] = content, time.monotonic()
        if listed_at - observed[path][1] < own.ttl:
            owners.append(" ".join(content.decode(errors="replace").split()[:2]))
        else:
            log.info("removing the expired lease %s of %s", path, content.decode(errors="replace"))
            path.fs.rm_file(path.path)
    return owners

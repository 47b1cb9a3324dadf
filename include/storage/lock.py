"""A lock on an object store, which has none: leases that are renewed while their owner lives."""

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
    """The right to change a place, which one at a time has (see `alone`)."""

    def __init__(self, path: UPath, lapse: float):
        self.path, self.lapse = path, lapse
        self._beats, self._renewed = 0, 0.0
        self._over = threading.Event()

    def renew(self) -> None:
        """Write it down, another time than before."""
        began = time.monotonic()
        self._beats += 1
        content = f"{socket.gethostname()} {os.getpid()} {self._beats}".encode()
        self._put(self.path, content)
        self._renewed = began

    def withdraw(self) -> None:
        """Give it up; where that fails, it lapses."""
        with suppress(Exception):
            self.path.fs.rm_file(self.path.path)

    def write(self, path: UPath, content: bytes) -> None:
        """Write a small object, unless the claim may have lapsed, and never after it may have.

        Raises:
            TransientError: it could not be renewed in time.
        """
        self.check()
        self._put(path, content)

    def check(self) -> None:
        """Raises:
        TransientError: the claim could not be renewed in time, so that others may take it for dead.
        """
        if time.monotonic() - self._renewed > self.lapse / 2:
            raise TransientError(
                f"the object store did not answer for {self.lapse / 2:g} s while {self.path.parent.parent} was changed",
                "Retry the task: what is there already is not written again",
            )

    def _put(self, path: UPath, content: bytes) -> None:
        fs = path.fs
        if fs.async_impl:  # one that hangs must not arrive when the claim has lapsed
            sync(fs.loop, fs._pipe_file, path.path, content, timeout=self.lapse / 3)
        else:
            fs.pipe_file(path.path, content)

    def _keep(self) -> None:
        while not self._over.wait(self.lapse / 6):
            with suppress(Exception):  # the next one may arrive; `check` looks at the time
                self.check()
                self.renew()

    @contextmanager
    def kept(self) -> Iterator[Lease]:
        """Renews it as long as this process lives and is at it."""
        keeper = threading.Thread(target=self._keep, daemon=True)
        keeper.start()
        try:
            yield self
        finally:
            self._over.set()
            keeper.join()


@contextmanager
def lock(folder: UPath, lapse: float = 60.0, patience: float = 900.0) -> Iterator[Lease]:
    """Waits until nobody else has a claim in a folder, and holds one there.

    Who sees no claim writes one, then lists them all, and goes on only when there is no other: of two, the one that
    wrote later sees the other's. Otherwise it withdraws and tries again after a random pause. A claim is renewed
    while its owner lives; one that stayed the same for `lapse` has lost its owner. Clocks are not compared.

    Args:
        lapse: seconds.
        patience: seconds to wait for others that are alive.

    Raises:
        TransientError: others had claims all the time.
    """
    claim = Lease(folder / uuid.uuid4().hex, lapse)
    seen: dict[UPath, tuple[bytes, float]] = {}
    began, pause = time.monotonic(), 0.1
    try:
        while True:
            others = _living(folder, claim, seen)
            if not others:
                claim.renew()
                others = _living(folder, claim, seen)
                if not others:
                    break
                claim.withdraw()
            if time.monotonic() - began > patience:
                raise TransientError(
                    f"{folder.parent} is being changed by {', '.join(others)} for {patience:g} s", "Retry the task"
                )
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, lapse / 12)
        with claim.kept():
            yield claim
    finally:
        claim.withdraw()


def _living(folder: UPath, own: Lease, seen: dict[UPath, tuple[bytes, float]]) -> list[str]:
    """Who else has a claim that has not lapsed: machine and process of each.

    Args:
        seen: each claim's content and since when it is known; kept from look to look.
    """
    looked = time.monotonic()
    contents = read_all(folder / name for name in list_dir(folder) if name != own.path.name)
    for gone in seen.keys() - contents.keys():
        del seen[gone]
    living = []
    for path, content in contents.items():
        if path not in seen or seen[path][0] != content:
            seen[path] = content, time.monotonic()
        if looked - seen[path][1] < own.lapse:
            living.append(" ".join(content.decode(errors="replace").split()[:2]))
        else:
            log.info("%s has lost its owner, %s, and is removed", path, content.decode(errors="replace"))
            path.fs.rm_file(path.path)
    return living

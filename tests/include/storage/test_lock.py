"""The lock on object stores: two processes at once, renewed, expired and old leases."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from upath import UPath

from include.errors import TransientError
from include.storage.locations import open_path
from include.storage.lock import Lease, lock
from tests.services.s3 import S3, Proxy

LONG_TTL = 600.0  # never expires during a test


def through(proxy: Proxy, uri: str) -> UPath:
    """A path on the server behind a proxy."""
    return UPath(uri, endpoint_url=proxy.environment["AWS_ENDPOINT_URL_S3"], use_listings_cache=False)


def test_of_two_processes_that_list_no_lease_at_the_same_moment_the_later_one_gives_way(s3: S3) -> None:
    uri, requests = "s3://retune/registry/leases", []
    with ExitStack() as first:

        def after_request(request: str) -> None:
            requests.append(request)
            if len(requests) == 1:  # the second process has listed the empty folder, and has no answer yet
                first.enter_context(lock(open_path(uri), LONG_TTL))

        with (
            Proxy(s3, lambda number, path: None, after_request) as proxy,
            pytest.raises(TransientError, match=r"s3://retune/registry was locked by \S+ \d+ for 0 s"),
            lock(through(proxy, uri), LONG_TTL, timeout=0),
        ):
            pytest.fail("two processes hold the lock")
        assert requests[0].startswith("GET"), "the listing"
        assert len(s3.objects("retune")) == 1, "the second process has removed its own lease"
    assert s3.objects("retune") == set()


def test_a_lease_that_is_renewed_is_respected_for_much_longer_than_its_ttl(s3: S3) -> None:
    uri, ttl = "s3://retune/registry/leases", 0.5
    lease = Lease(open_path(uri) / "owner", LONG_TTL)
    lease.renew()
    with (
        Proxy(s3, lambda number, path: None, lambda request: lease.renew()) as proxy,
        pytest.raises(TransientError, match="was locked by"),
        lock(through(proxy, uri), ttl, timeout=6 * ttl),
    ):
        pytest.fail("a lease with an owner was ignored")
    assert s3.objects("retune") == {"registry/leases/owner"}


def test_an_owner_renews_its_lease_and_removes_it_and_a_dead_owners_lease_expires(tmp_path: Path) -> None:
    folder = UPath(f"memory://{tmp_path.name}/leases")
    Lease(folder / "dead", LONG_TTL).renew()
    with lock(folder, ttl=0.6) as lease:
        assert [path.name for path in folder.iterdir()] == [lease.path.name], "the dead owner's lease was removed"
        first, deadline = lease.path.read_bytes(), time.monotonic() + 60
        while lease.path.read_bytes() == first:
            assert time.monotonic() < deadline, "the lease is not renewed"
            time.sleep(0.02)
    assert not folder.fs.find(folder.path)


def test_half_a_ttl_after_its_last_renewal_a_lease_allows_no_more_writes(tmp_path: Path) -> None:
    folder = UPath(f"memory://{tmp_path.name}")
    fresh, old = Lease(folder / "leases" / "fresh", LONG_TTL), Lease(folder / "leases" / "old", 4.0)
    fresh.renew()
    fresh.write(folder / "fresh", b"x")
    old.renew()
    time.sleep(old.ttl / 2)  # the other half is left for the write itself, before other processes take the lock
    with pytest.raises(TransientError, match="could not be renewed for 2 s"):
        old.write(folder / "old", b"x")
    assert (folder / "fresh").exists() and not (folder / "old").exists()

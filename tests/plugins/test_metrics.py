"""Metrics through Airflow: real packets and requests of headless runs; nothing where they are off."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from airflow.sdk.observability import stats
from airflow.sdk.observability.metrics import stats_utils
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from plugins import metrics
from retune.airflow_process import airflow_environment
from tests.conftest import PROJECT, last_run


@contextmanager
def statsd() -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """Open a StatsD server's socket; yield it with Airflow's settings for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
        server.setblocking(False)
        where = {
            "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
            "AIRFLOW__METRICS__STATSD_PORT": str(server.getsockname()[1]),
        }
        yield server, where


def received(server: socket.socket) -> dict[str, str]:
    """Return Retune's metrics received so far, by name; each value with its kind."""
    found = {}
    while True:
        try:
            name, _, value = server.recv(65536).decode().partition(":")
        except BlockingIOError:
            return found
        if name.startswith("airflow.retune."):
            found[name.removeprefix("airflow.")] = value


@contextmanager
def collector() -> Iterator[tuple[dict[str, dict[str, str]], str]]:
    """Start an OpenTelemetry collector; yield the attributes of each metric received from Retune, and its address."""
    found: dict[str, dict[str, str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                    for point in (*metric.gauge.data_points, *metric.sum.data_points):
                        if metric.name.startswith("airflow.retune."):
                            attributes = {entry.key: entry.value.string_value for entry in point.attributes}
                            found.setdefault(metric.name, {}).update(attributes)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_sends_metrics_to_statsd_and_opentelemetry_and_maintenance_runs_in_airflow(
    var: Path, airflow_home: Path, small_recipe: Callable, retune: Callable
) -> None:
    small_recipe()
    with statsd() as (server, where), collector() as (collected, address):
        done = retune("run", "small", AIRFLOW__METRICS__STATSD_ON="True", **where)
        assert done.returncode == 0, done.stdout
        got = received(server)
        stages = last_run(var)["stages"]
        for stage in set(stages) - {"resolve", "approve"}:  # which make nothing
            assert float(got[f"retune.stage.seconds.small.{stage}"].removesuffix("|g")) == stages[stage]["seconds"]
        assert float(got["retune.train.tokens_per_second.small"].removesuffix("|g")) > 0
        assert float(got["retune.train.peak_memory_bytes.small"].removesuffix("|g")) > 1e8
        assert got["retune.validate.rows_refused.small"] == got["retune.validate.rows_refused"] == "0|g"
        assert got["retune.runs.small.published"] == got["retune.runs"] == "1|c"

        otel = {"AIRFLOW__METRICS__OTEL_ON": "True", "OTEL_EXPORTER_OTLP_ENDPOINT": address}
        done = retune("run", "small", **where, **otel, OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
        assert done.returncode == 0, done.stdout
        assert collected["airflow.retune.runs"] == {"recipe": "small", "verdict": "unchanged"}
        assert "airflow.retune.stage.seconds" not in collected, "every stage was reused"
        assert received(server) == {}, "statsd_on is not set"

    maintained = subprocess.run(
        [sys.executable, "-m", "airflow", "dags", "test", "maintenance", "--conf", '{"dry_run": true}'],
        env=airflow_environment(var / "airflow" / "headless"), cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert maintained.returncode == 0, maintained.stdout
    assert re.search(r"would remove 0 artifacts of small, 0 Bytes; kept \d+ \(\d+ published, \d+ in use\)",
                     maintained.stdout)  # fmt: skip
    assert maintained.stdout.count("of small on this machine") >= 2, "once for each queue"


def test_metrics_are_off_by_default_and_a_broken_backend_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    summary = {"recipe": "my.model", "verdict": "refused"}
    with statsd() as (server, where):
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)
        metrics.run_ended(summary)
        assert received(server) == {}
        monkeypatch.setenv("AIRFLOW__METRICS__STATSD_ON", "True")
        stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)
        metrics.run_ended(summary)
        assert received(server) == {"retune.runs": "1|c", "retune.runs.my__model.refused": "1|c"}

        monkeypatch.setenv("AIRFLOW__METRICS__STATSD_PORT", "no number")
        stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)
        metrics.run_ended(summary)
        metrics.stage_done("train", {"recipe": "my.model", "run": "gone"})
        assert caplog.text.count("metrics were not sent: ") == 2
    monkeypatch.undo()
    stats.initialize(factory=stats_utils.get_stats_factory(), export_legacy_names=True)
    assert not {name for name in os.environ if name.startswith("AIRFLOW__METRICS__")}

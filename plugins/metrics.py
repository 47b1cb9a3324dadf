"""Metrics of runs through Airflow's own metrics (StatsD, Datadog or OpenTelemetry); none if `[metrics]` is off.

| metric | kind | tags |
|---|---|---|
| `retune.stage.seconds` | gauge | `recipe`, `stage` |
| `retune.train.tokens_per_second`, `retune.train.peak_memory_bytes` | gauge | `recipe` |
| `retune.validate.rows_refused` | gauge | `recipe` |
| `retune.runs` | counter | `recipe`, `verdict` |

Plain StatsD has no tags. If `[metrics] legacy_names_on` is true, each metric is also sent with the tags' values at the
end of its name, like Airflow's own metrics: `retune.stage.seconds.my_model.train`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from airflow.sdk.configuration import conf
from airflow.sdk.observability import stats

from include.pipeline.contracts import TrainOutput, ValidateOutput
from include.pipeline.records import Lineage, log
from include.pipeline.stage import output_of
from include.storage.artifacts import Store

BACKENDS = ("statsd_on", "statsd_datadog_enabled", "otel_on")


def _when_enabled(function: Callable[..., None]) -> Callable[..., None]:
    """Call the function only if a metrics backend is on, and log its errors: a metric never fails a run."""

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> None:
        try:
            if any(conf.getboolean("metrics", backend, fallback=False) for backend in BACKENDS):
                function(*arguments)
        except Exception as error:
            log.warning("metrics were not sent: %s: %s", type(error).__name__, error)

    return wrapper


@_when_enabled
def stage_done(stage: str, lineage: Lineage) -> None:
    """Send a stage's seconds and key numbers as gauges, unless its output was reused."""
    store, recipe = Store(), lineage["recipe"]
    records = store.read_records(recipe, lineage["run"]).values()
    record = next(one for one in records if (one.get("stage"), one.get("fingerprint")) == (stage, lineage[stage]))
    if record["reused"]:
        return
    _send(stats.gauge, "retune.stage.seconds", record["seconds"], recipe=recipe, stage=stage)
    metadata = output_of(store, lineage, stage).metadata
    if isinstance(metadata, TrainOutput):
        _send(stats.gauge, "retune.train.tokens_per_second", metadata.tokens_per_second, recipe=recipe)
        _send(stats.gauge, "retune.train.peak_memory_bytes", metadata.peak_memory_bytes, recipe=recipe)
    if isinstance(metadata, ValidateOutput):
        _send(stats.gauge, "retune.validate.rows_refused", metadata.refused, recipe=recipe)


@_when_enabled
def run_ended(summary: dict[str, Any]) -> None:
    """Count a run by its verdict."""
    _send(stats.incr, "retune.runs", 1, recipe=summary["recipe"], verdict=summary["verdict"])


def _send(send: Callable[..., None], name: str, value: float, **tags: str) -> None:
    send(name, value, tags=tags)
    if conf.getboolean("metrics", "legacy_names_on"):
        send(".".join([name, *(tag.replace(".", "__") for tag in tags.values())]), value)

"""Recipe fields: when a recipe runs, who is notified, how long artifacts are kept."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator


class Operations(BaseModel):
    """When the recipe runs by itself, who is notified, how long artifacts are kept.

    These fields can be set in the recipe file only, not in the trigger form. They do not influence the model.
    """

    cron: str | None = Field(
        None,
        description="Run at these times: five cron fields, or for example @daily. A run is skipped if recipe, data and "
        "base are unchanged since a finished run. Empty (default): no schedule.",
    )
    timezone: str = Field("UTC", description="Time zone of cron, for example `Europe/Berlin`.")
    watch: bool = Field(False, description="Run when the dataset has a new revision.")
    watch_every: float = Field(300.0, ge=1, description="Seconds between two checks for a new revision.")
    shard_rows: int | None = Field(
        None,
        ge=1,
        description="Rows per shard. With more rows than this, all CPU workers share the stages `standardize` and "
        "`template`; a shard is a multiple of 5,000 rows, and there are at most 1,000 shards. The output is the same. "
        "Empty (default): one worker does all rows.",
    )
    deadline_hours: float | None = Field(
        None,
        gt=0,
        description="Send the alert `late` if a run has not finished this many hours after it was queued. Empty "
        "(default): no deadline.",
    )
    timeout_hours: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Hours after which a try of a stage is stopped and the stage retried, by name of the stage; for "
        "example `train: 96`. A stage without an entry keeps its default.",
    )
    alert_on: list[Literal["failed", "refused", "published", "late"]] = Field(
        ["failed", "refused", "published", "late"], description="Events that are sent to the recipients of alerts."
    )
    alert_mail: list[str] = Field(
        [], description="Mail addresses that receive alerts, sent through the Airflow connection `smtp_default`."
    )
    alert_webhooks: list[str] = Field(
        [],
        description="Ids of Airflow connections that receive alerts, each with the URL of a Slack-compatible webhook.",
    )
    keep_days: int = Field(
        30,
        ge=1,
        description="Days to keep artifacts that no run uses. After them, the DAG `maintenance` removes artifacts, "
        "except those of a live or published version or of a run that has not ended.",
    )

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, expression: str | None) -> str | None:
        if expression is not None:
            from croniter import croniter  # the engine does not need it

            if not croniter.is_valid(expression):
                raise ValueError("not a cron expression (minute hour day month weekday)")
        return expression

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        if name not in zoneinfo.available_timezones():
            raise ValueError("there is no such time zone")
        return name

"""When a recipe runs, who is notified, what is kept."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator


class Operations(BaseModel):
    """When the recipe runs by itself, who is told what, what is kept. The recipe file's alone: not in the form, and no
    part of what a model is made of.
    """

    cron: str | None = Field(
        None, description="Run at these times: five fields, or @daily and the like. A run with nothing new is skipped."
    )
    timezone: str = Field("UTC", description="Time zone of cron, for example Europe/Berlin.")
    watch: bool = Field(False, description="Run whenever the dataset has a new revision.")
    watch_every: float = Field(300.0, ge=1, description="Seconds between two looks at the dataset's revision.")
    shard_rows: int | None = Field(
        None,
        ge=1,
        description="Above so many rows, `standardize` and `template` are shared by all CPU workers, in shards of so "
        "many rows (in steps of 5,000, and at most 1,000 shards). Empty: one worker does all. The result is the same.",
    )
    deadline_hours: float | None = Field(
        None, gt=0, description="Tell those in alert_* when a run has not ended so long after it was queued."
    )
    timeout_hours: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Hours after which one try of a stage is ended and tried again, by stage: `train: 96`.",
    )
    alert_on: list[Literal["failed", "refused", "published", "late"]] = Field(
        ["failed", "refused", "published", "late"], description="What alert_mail and alert_webhooks are told."
    )
    alert_mail: list[str] = Field(
        [], description="Mail addresses, written to through the Airflow connection `smtp_default`."
    )
    alert_webhooks: list[str] = Field(
        [], description="Airflow connections, each with the address of a Slack-compatible webhook."
    )
    keep_days: int = Field(
        30,
        ge=1,
        description="What no run of the last so many days has used is removed by the DAG `maintenance`; what is live, "
        "published or in use never is.",
    )

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, expression: str | None) -> str | None:
        if expression is not None:
            from croniter import croniter  # not where only the engine runs

            if not croniter.is_valid(expression):
                raise ValueError("not a cron expression (minute hour day month weekday)")
        return expression

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        if name not in zoneinfo.available_timezones():
            raise ValueError("there is no such time zone")
        return name

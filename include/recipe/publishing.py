"""Where the adapter goes, and who must agree."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Publishing(BaseModel):
    """Where the adapter goes."""

    registry: str | None = Field(
        None,
        pattern=r"^(file://|hf://[^/]+/[^/]+$|(s3|gs|az|abfs)://[^/]+/.)",
        description="`hf://owner/name` for the Hugging Face Hub, `s3://bucket/path` for an object store (also `gs`, "
        "`az`, `abfs`), or `file:///folder`. Empty: a folder of the recipe's name under `RETUNE_REGISTRY`, by default "
        "under `var/registry`.",
    )
    private: bool = Field(True, description="Create the Hub repository as a private one.")
    approve: Literal["always", "on_regression", "never"] = Field(
        "never",
        description="Whether a person must approve what the gate let through: `always`, or only when something of it "
        "is worse than what is live (`on_regression`). The run waits in Airflow, under Required Actions.",
    )
    approve_within_hours: float = Field(
        24.0, gt=0, le=8760, description="Without an answer for so long, nothing is published."
    )
    merged_16bit: bool = Field(
        False,
        description="Also publish base and adapter merged into one model of 16 bits, beside the adapter as "
        "`<registry>-merged`: vLLM and others load it as it is.",
    )

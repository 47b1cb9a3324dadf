"""Recipe fields: the registry and the approval."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, Field, field_validator

REGISTRY = r"^(file://|hf://[^/]+/[^/]+$|(s3|gs|az|abfs)://[^/]+/.)"


class Publishing(BaseModel):
    """Where the adapter is published, and who must approve it."""

    registry: str | None = Field(
        None,
        json_schema_extra={"pattern": REGISTRY},
        description="URI to publish to: `hf://owner/name` (Hugging Face Hub), `s3://bucket/path` (object store; also "
        "`gs`, `az`, `abfs`), or `file:///folder`. Empty (default): the folder with the recipe's name under "
        "`RETUNE_REGISTRY`, which is `var/registry` if it is not set.",
    )
    private: bool = Field(
        True, description="Create the Hub repository as private. Has no effect on a repository that exists."
    )
    approve: Literal["always", "on_regression", "never"] = Field(
        "never",
        description="Whether a person must approve a candidate after the gate. `always`: each one. `on_regression`: "
        "only if the candidate regresses: its loss within the margin, an optional check, or a warning of the gate. The "
        "run waits in Airflow, under Required Actions.",
    )
    approve_within_hours: float = Field(
        24.0, gt=0, le=8760, description="Hours to wait for the approval. After them, the run fails without publishing."
    )
    merged_16bit: bool = Field(
        False,
        description="Also publish the base with the adapter merged into it, as one 16-bit model in "
        "`<registry>-merged`, which vLLM and other servers load directly.",
    )

    @field_validator("registry")
    @classmethod
    def _is_registry(cls, uri: str | None) -> str | None:
        if uri is not None and not re.search(REGISTRY, uri):
            raise ValueError(
                "not a registry: write hf://owner/name, s3://bucket/path (or gs, az, abfs), or file:///folder"
            )
        return uri

"""Contracts of stages: no field or file name is lost or renamed unnoticed, and stages read by type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from include.errors import RetuneError
from include.pipeline.contracts import CONTRACTS, DownloadOutput, ValidateOutput
from include.pipeline.stage import Output, Result, StageContext, find_output, stage
from include.storage.artifacts import Store
from tests.conftest import PROJECT

KNOWN = PROJECT / "tests" / "include" / "pipeline" / "contracts.json"


def contracts() -> dict[str, Any]:
    """Return for each stage its file names and the types of its metadata."""
    found = {}
    for name, contract in CONTRACTS.items():
        files = {key: value for key, value in vars(contract).items() if key.isupper()}
        schema = contract.model_json_schema()
        found[name] = {"files": files, "metadata": _without_texts(schema)}
    return found


def _without_texts(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _without_texts(value) for key, value in part.items() if key not in ("title", "description")}
    return [_without_texts(value) for value in part] if isinstance(part, list) else part


def test_no_contract_loses_or_renames_a_field_or_a_file() -> None:
    """Stored artifacts and published manifests have these fields. On purpose: `WRITE_GOLDEN=1 pytest <this file>`."""
    if os.environ.get("WRITE_GOLDEN"):
        KNOWN.write_text(json.dumps(contracts(), indent=1, sort_keys=True) + "\n")
    assert contracts() == json.loads(KNOWN.read_text()), "raise the versions of the stages concerned, then WRITE_GOLDEN"


def test_metadata_with_a_lost_a_renamed_or_a_wrong_field_is_refused(tmp_path: Path) -> None:
    whole = {"rows": 3, "eval_rows": 0, "sha256": "a"}
    assert DownloadOutput.model_validate(whole).rows == 3
    for wrong in ({"rows": 3}, {"rows": 3, "sha": "a"}, {**whole, "more": 1}, {"rows": "many", "sha256": "a"}):
        with pytest.raises(ValidationError):
            DownloadOutput.model_validate(wrong)
    (tmp_path / "work").mkdir()
    store = Store(f"file://{tmp_path}/store")
    store.commit(tmp_path / "work", "r", "download", "abc", summary="", metadata={"rows": 3, "eval_rows": 0}, inputs={})
    output = find_output(store, "r", "download", "abc")
    assert output
    with pytest.raises(RetuneError, match="was made by another version of Retune: its metadata differs in sha256"):
        _ = output.metadata.rows


def test_a_stage_names_the_contract_of_each_stage_that_it_reads() -> None:
    def validate(context: StageContext, download: Output[DownloadOutput]) -> Result[ValidateOutput]:
        raise NotImplementedError

    assert stage(version=1)(validate).input_stages == ("download",)

    def standardize(context: StageContext, validate: Output[DownloadOutput]) -> Result[ValidateOutput]:
        raise NotImplementedError

    with pytest.raises(TypeError, match="annotate validate as Output"):
        stage(version=1)(standardize)

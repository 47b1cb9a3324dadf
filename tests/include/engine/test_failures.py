"""What libraries raise in a job becomes one sentence, and decides rightly about retries."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from include.engine.device_plan import Device
from include.engine.failures import explain
from include.engine.model import load_adapter, load_base
from include.errors import BadData, NoSpace, NotFound, PermanentError, ProcessLost, RetuneError, TransientError

CPU = Device(device="cpu", device_name="", dtype="float32")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), TransientError, "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), TransientError, "too little memory"),
        (MemoryError(), TransientError, "too little memory (MemoryError)"),
        (RuntimeError("CUDA error: device-side assert triggered"), PermanentError, "an id or index is out of range"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), ProcessLost, "the GPU or its connection"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), ProcessLost, "the GPU or its connection"),
        (ValueError("NaNs detected in the merged weights. The adapter default seems to be broken"), BadData, "finite"),
        (RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"), BadData, "not finite"),
        (ImportError("Using bitsandbytes 4-bit needs it"), PermanentError, "lacks a package"),
        (OSError(errno.ENOSPC, "No space left on device"), NoSpace, "the disk of the work folder is full"),
        (KeyError("rope_theta"), PermanentError, "the merge process failed: KeyError: 'rope_theta'"),
        (ValueError("`x` must be\n  positive"), PermanentError, "ValueError: `x` must be positive"),
        (ConnectionResetError("peer"), RetuneError, "ConnectionResetError: peer"),
    ],
)
def test_an_error_of_a_library_has_a_cause_and_the_right_class(
    error: Exception, kind: type, says: str, tmp_path: Path
) -> None:
    found = explain(error, "merge", tmp_path / "not" / "made" / "yet")  # a merge fails before its folder is there
    assert type(found) is kind
    assert says in found.what
    assert found.do
    assert "\n" not in str(found)


def broken(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base")) / "model.safetensors"


def test_damaged_weights_are_named(tiny_base: Path, tmp_path: Path) -> None:
    file = broken(tiny_base, tmp_path)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(NotFound, match="field 'base_model': .* cannot be loaded: .*fetch them again"):
        load_base(file.parent, CPU)


def test_missing_weights_are_not_filled_with_random_numbers(tiny_base: Path, tmp_path: Path) -> None:
    file = broken(tiny_base, tmp_path)
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(NotFound, match=r"lacks 1 weights, for example model.layers.1.mlp.up_proj.weight"):
        load_base(file.parent, CPU)


def test_weights_of_another_shape_are_named(tiny_base: Path, tmp_path: Path) -> None:
    file = broken(tiny_base, tmp_path)
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(NotFound, match="field 'base_model': .* cannot be loaded"):
        load_base(file.parent, CPU)


def test_a_damaged_adapter_is_named(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(NotFound, match="the adapter in .* cannot be loaded: .*Train it again"):
        load_adapter(load_base(tiny_base, CPU), tmp_path)

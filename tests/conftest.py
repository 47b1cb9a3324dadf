"""Fixtures that every test may use. Each test has a state folder of its own; nothing here stands in for the product."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from filelock import FileLock

from tests.services import published as packages
from tests.services.s3 import S3
from tests.tiers import cost, missing_marker, starts

if TYPE_CHECKING:
    from tests.services.airflow import SharedAirflow

# how the tokenizer of Llama 3 splits texts, from its tokenizer.json
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.stem for path in (PROJECT / "include" / "recipes").glob("*.yaml"))
MATERIAL = PROJECT.parent / "shared" / "material"

os.environ.update(
    HF_HUB_DISABLE_XET="1",  # the test hub has no xet
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    HF_ENDPOINT="http://127.0.0.1:9",  # no test reaches the real Hub; those that need one start tests/hub.py
)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # tests side by side; torch's threads on busy cores wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests by what they start. The tests that take long come first: no process waits for the last one.

    pytest-xdist begins with the largest group, so a group per file would put the fast files first.
    """
    for item in items:
        if isinstance(item, pytest.Function):
            for tier in starts(item):
                item.add_marker(tier)
    items.sort(key=cost, reverse=True)


@pytest.fixture(autouse=True)
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Fail a test that has started the engine or Airflow and does not say so: it would slow down `make test-fast`."""
    yield
    if name := missing_marker(request.node, tmp_path):
        pytest.fail(f"the test has started what the marker {name!r} is for: add @pytest.mark.{name}")


@pytest.fixture(scope="session")
def material() -> Path:
    """Real tokenizers, models and datasets that the project did not write."""
    if not MATERIAL.is_dir():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{MATERIAL} is not there")
    return MATERIAL


@pytest.fixture(scope="session")
def published(material: Path) -> Callable[[str], Path]:
    """Returns the folder of a published tokenizer, or of a real model, by its name in `fetch.py`."""

    def folder(name: str) -> Path:
        try:
            return packages.published(material, name)
        except packages.NotPublished as error:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))

    return folder


@pytest.fixture(autouse=True)
def var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of this test."""
    folder = tmp_path / "var"
    monkeypatch.setenv("RETUNE_VAR", str(folder))
    monkeypatch.delenv("RETUNE_STORE", raising=False)
    monkeypatch.delenv("RETUNE_REGISTRY", raising=False)
    monkeypatch.delenv("RETUNE_RECIPES", raising=False)
    return folder


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    """An object store with the bucket `retune`, to which the environment leads."""
    with S3(tmp_path / "s3", "retune") as server:
        yield server


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first process of a test run makes for all of them; `make` fills it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and the special tokens of Llama 3, small enough to train in a second."""
    return made_once(tmp_path_factory, "tiny_base", _make_tiny_base)


def _make_tiny_base(folder: Path) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [(PROJECT / "include" / "demo" / "village.py").read_text(encoding="utf-8")],
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[0], eos_token=special[4])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=4,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def conversation(question: str, answer: str) -> dict[str, Any]:
    """A ShareGPT row of two turns."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def sixty_rows() -> str:
    """Sixty good rows as the text of a jsonl file."""
    rows = [conversation(f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}.") for i in range(60)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Sixty good rows as jsonl."""
    path = tmp_path / "rows.jsonl"
    path.write_text(sixty_rows())
    return path


def small_fields(dataset: Path, base: Path) -> dict[str, Any]:
    """The fields of a recipe that trains the tiny base within a second."""
    return {
        "dataset": str(dataset), "base_model": str(base), "max_seq_length": 256, "max_steps": 8, "save_steps": 2,
        "learning_rate": 0.01, "holdout_share": 0.2, "prompts": ["What is 2 plus 3?"], "required_checks": [],
        "max_new_tokens": 8,
    }  # fmt: skip


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The state folder of a run of `small_recipe` on sixty rows up to the smoke test, made once for all tests."""
    rows = made_once(tmp_path_factory, "rows", _make_rows) / "rows.jsonl"

    def make(folder: Path) -> None:
        folder.mkdir()
        recipe = folder / "small.yaml"
        recipe.write_text(yaml.safe_dump({"description": "a test's recipe", **small_fields(rows, tiny_base)}))
        environment = {name: value for name, value in os.environ.items() if name != "RETUNE_STORE"}
        done = subprocess.run(
            [sys.executable, "-m", "retune", "stage", "small", "--until", "smoke_test"], cwd=PROJECT,
            env={**environment, "RETUNE_VAR": str(folder), "RETUNE_RECIPES": str(recipe)}, stderr=subprocess.PIPE,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "small_run", make)


def _make_rows(folder: Path) -> None:
    folder.mkdir()
    (folder / "rows.jsonl").write_text(sixty_rows())


@pytest.fixture
def trained(var: Path, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sixty rows of a training that is in this test's store already, for tests of what comes after the training.

    The recipe is `small_recipe(dataset=str(trained))`.
    """
    reuse_training(small_run, var, "small")
    return made_once(tmp_path_factory, "rows", _make_rows) / "rows.jsonl"


def reuse_training(small_run: Path, var: Path, recipe: str) -> None:
    """Copy the artifacts of `small_run` to the store of another state folder, as those of a recipe."""
    for stage in ("download", "validate", "standardize", "template", "train", "smoke_test"):
        shutil.copytree(small_run / "store" / "small" / stage, var / "store" / recipe / stage)


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a recipe file and makes it known; fields by keyword."""

    def write(name: str = "small", **fields: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"description": "a test's recipe", **fields}))
        monkeypatch.setenv("RETUNE_RECIPES", str(path))
        return path

    return write


@pytest.fixture
def small_recipe(write_recipe: Callable[..., Path], dataset: Path, tiny_base: Path) -> Callable[..., Path]:
    """A recipe that trains the tiny base on the sixty rows; fields by keyword replace its own."""

    def write(name: str = "small", **fields: Any) -> Path:
        return write_recipe(name, **{**small_fields(dataset, tiny_base), **fields})

    return write


@pytest.fixture
def pipeline() -> Callable[..., dict[str, str]]:
    """Runs the stages in this process, without Airflow, up to one of them; returns the lineage."""
    import great_expectations  # noqa: F401  (once here, and not in each process that a stage forks for its checks)

    from tasks.stages import run_stages

    return lambda recipe, until="verify", run_id="test", **values: run_stages(recipe.stem, values, run_id, until)


@pytest.fixture
def artifact() -> Callable[[dict[str, str]], Any]:
    """The artifact of the newest stage on a lineage, or of a named one."""
    from include.pipeline.stage import output_of
    from include.storage.artifacts import Store

    return lambda lineage, name=None: output_of(Store(), lineage, name or list(lineage)[-1])


@pytest.fixture
def retune(var: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs `python -m retune` as a person would; returns the finished process with its output."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "retune", *arguments], cwd=PROJECT, env={**os.environ, **environment},
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip

    yield run


@pytest.fixture(scope="session")
def migrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Airflow home with a database that `retune` has migrated, made once for all tests."""
    from retune.airflow_process import airflow_environment, migrate

    def make(home: Path) -> None:
        home.mkdir()
        migrate(airflow_environment(home), home / "migrate.log")

    return made_once(tmp_path_factory, "migrated", make)


@pytest.fixture
def airflow_home(var: Path, migrated_home: Path) -> Path:
    """The folder of this test's Airflow homes, whose databases need no migration: a copy of one that was migrated."""
    for name in ("headless", "ui"):
        copy_home(migrated_home, var / "airflow" / name)
    return var / "airflow"


@pytest.fixture(scope="session")
def shared_airflow(tmp_path_factory: pytest.TempPathFactory, migrated_home: Path) -> Iterator[SharedAirflow]:
    """One `retune up` for all tests of the group `up`. A start takes 25 seconds of CPU, a recipe more takes none."""
    from tests.services.airflow import SharedAirflow, up

    folder = tmp_path_factory.mktemp("up")
    copy_home(migrated_home, folder / "var" / "airflow" / "ui")
    (folder / "recipes").mkdir()
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RETUNE_VAR", str(folder / "var"))
            patch.setenv("RETUNE_RECIPES", str(folder / "recipes"))
            airflow = stack.enter_context(up(folder / "var"))
        yield SharedAirflow(airflow, folder / "var", folder / "recipes")


@pytest.fixture
def shared(var: Path, shared_airflow: SharedAirflow, monkeypatch: pytest.MonkeyPatch) -> SharedAirflow:
    """The shared Airflow, whose state folder is this test's, too. Each test adds recipes with names of its own."""
    monkeypatch.setenv("RETUNE_VAR", str(shared_airflow.var))
    return shared_airflow


def copy_home(migrated: Path, home: Path) -> None:
    """Make an Airflow home whose database needs no migration."""
    home.mkdir(parents=True)
    for file in (migrated / "airflow.db", *migrated.glob(".migrated-*")):
        shutil.copy2(file, home)


def unlock(*places: Path) -> None:
    """Permit this account to change files of artifacts, which are read-only, as somebody might who damages them."""
    for path in (path for place in places for path in (place, *place.rglob("*"))):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)


def last_run(var: Path) -> dict[str, Any]:
    """What the newest run left for programs."""
    return json.loads((var / "last_run.json").read_text())

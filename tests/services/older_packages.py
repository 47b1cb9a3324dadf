"""A second environment: the packages of `tests/compat-requirements.txt` before those of the first one.

It shares torch and everything else with the first environment, so that it is installed in seconds, once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from tests.conftest import PROJECT

REQUIREMENTS = PROJECT / "tests" / "compat-requirements.txt"


def load_with_older_packages(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what `tests.services.loading.load` returns for each job in the second environment, in one process."""
    path = os.pathsep.join([str(installed()), str(PROJECT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.services.loading"], input=orjson.dumps(jobs), capture_output=True, check=False,
        cwd=PROJECT, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return orjson.loads(done.stdout.splitlines()[-1])


def installed() -> Path:
    """Return the folder of the packages, after installing them if that has not been done."""
    folder = Path(sys.prefix) / f"compat-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            tmp = folder.with_suffix(".tmp")  # an installation that was cut off is not taken for a whole one
            shutil.rmtree(tmp, ignore_errors=True)
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
            pip = [sys.executable, "-m", "pip", "install", *options]
            subprocess.run([*pip, "--target", str(tmp), "-r", str(REQUIREMENTS)], check=True)
            tmp.rename(folder)
    return folder

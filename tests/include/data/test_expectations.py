"""Great Expectations is imported without what its expectations on a frame never use."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORTED = "import sys\nfrom include.data import expectations\nexpectations._import_great_expectations()\n"


def _run(code: str) -> str:
    """Run code in a fresh process, since an import happens once in each."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_large_libraries_are_left_out():
    names = "('scipy.stats._stats_py', 'altair.vegalite', 'sqlalchemy.engine', 'botocore.client')"
    assert _run(f"{IMPORTED}print([name for name in {names} if name in sys.modules])") == "[]"


@pytest.mark.parametrize(("module", "use"), [("scipy.stats", "stats.norm.cdf(0)"), ("altair", "alt.Chart.__name__")])
def test_a_left_out_module_is_there_when_it_is_used(module: str, use: str):
    users = "from great_expectations.expectations.core.expect_column_kl_divergence_to_be_less_than import alt, stats"
    assert _run(f"{IMPORTED}{users}\nprint({use})") == {"scipy.stats": "0.5", "altair": "Chart"}[module]


def test_a_database_library_that_is_already_there_stays():
    """Half of it would be missing otherwise: its submodules would still be found."""
    code = f"import sqlalchemy\n{IMPORTED}from great_expectations.compatibility import sqlalchemy as found\n"
    assert _run(f"{code}print(found.sqlalchemy is sqlalchemy)") == "True"

"""Addresses of pages in Airflow's UI, and the XCom keys that plugins read."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from airflow.sdk.configuration import conf

NOTE = "note"  # key of the XCom with the run's note
REPORTS = "/retune"  # path of plugins/report_page.py, below the API server's address


def report_address(dag_id: str, run_id: str) -> str:
    """Return the path of a run's report page. It has no host, because the server may have several names."""
    base_path = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
    return f"{base_path}{REPORTS}/report/{quote(dag_id, safe='{}')}/{quote(run_id, safe='{}')}"

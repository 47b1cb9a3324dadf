"""Addresses of pages in Airflow's UI, and the keys under which tasks leave what its pages show."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from airflow.sdk.configuration import conf

NOTE = "note"  # key of the XCom that becomes the run's note
REPORTS = "/retune"  # where plugins/report_page.py serves runs' reports, below the API server's address


def report_address(dag_id: str, run_id: str) -> str:
    """The address of a run's report page, without the host: people may come to the server under several names."""
    below = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
    return f"{below}{REPORTS}/report/{quote(dag_id, safe='{}')}/{quote(run_id, safe='{}')}"

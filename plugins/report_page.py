"""The report tab of a run in Airflow's UI, for users who may read the run."""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from include.errors import RetuneError
from include.recipe import NAME
from include.storage.artifacts import Store
from plugins.links import REPORTS, report_address

# the page shows texts of models and datasets, so it must not run scripts, load or send anything, or be framed
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
NO_REPORT = """<!doctype html><meta charset="utf-8"><title>No report</title>
<body style="font: 15px/1.5 system-ui, sans-serif; margin: 2rem">
<p>This run has no report. A run of a recipe has a report after its end, or while it waits for approval.</p>"""

UNREADABLE = """<!doctype html><meta charset="utf-8"><title>The report cannot be read</title>
<body style="font: 15px/1.5 system-ui, sans-serif; margin: 2rem">
<p>The report cannot be read: {}</p>"""


@cache
def _app() -> Any:
    # imported here, because every task's process loads the plugins, and only the API server needs these modules
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
    from airflow.api_fastapi.core_api.security import requires_access_dag
    from fastapi import Depends, FastAPI
    from fastapi.responses import HTMLResponse

    app = FastAPI(openapi_url=None)
    may_read_run = Depends(requires_access_dag(method="GET", access_entity=DagAccessEntity.RUN))

    @app.get("/report/{dag_id}/{run_id}", dependencies=[may_read_run])
    def page(dag_id: str, run_id: str) -> HTMLResponse:
        if re.fullmatch(NAME, dag_id) and set(run_id) != {"."}:  # stay inside the recipe's folder of runs
            store = Store()
            path = store.run_folder(dag_id, run_id) / "report.html"
            try:
                with store.read_errors():
                    return HTMLResponse(path.fs.cat_file(path.path), headers=HEADERS)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except RetuneError as error:
                return HTMLResponse(UNREADABLE.format(html.escape(str(error))), 503, HEADERS)
        return HTMLResponse(NO_REPORT, 404, HEADERS)

    return app


async def reports(scope: Any, receive: Any, send: Any) -> None:
    """Serve the report page of a run, and nothing else, to users who may read the run."""
    await _app()(scope, receive, send)


class ReportPage(AirflowPlugin):
    """Registers the app and the tab."""

    name = "retune_report_page"
    fastapi_apps = [{"app": reports, "url_prefix": REPORTS, "name": "Retune's reports"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Report",
            "destination": "dag_run",
            "href": report_address("{DAG_ID}", "{RUN_ID}"),
            "url_route": "report",
        }
    ]

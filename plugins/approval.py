"""The approval task: waits for a person's answer before a candidate is published, if the recipe asks for it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator

from include.errors import PermanentError, TransientError
from plugins.credentials import hub_account
from plugins.links import report_address
from tasks.approve import Answer, approve, ask


class Approval(ApprovalOperator):
    """Asks in Airflow's UI if `tasks.approve` has a question, and passes the lineage on.

    The task waits in the state `awaiting_input`, without a worker's slot. It succeeds if the candidate is approved. It
    fails without a retry if the candidate is rejected or nobody answers. A cleared task asks again.

    Args:
        lineage: the lineage up to `evaluate`.
    """

    template_fields = ("lineage",)  # not subject and body: they quote models' answers, which must not be templates

    def __init__(self, *, lineage: Any, **options: Any):
        super().__init__(subject="May this candidate go live?", defaults=self.REJECT, **options)
        self.lineage = lineage
        self.doc_md = approve.__doc__

    def execute(self, context: Any) -> Any:
        """Ask and wait for the answer, or pass the lineage on."""
        run = context["dag_run"]
        with hub_account():
            question = ask(self.lineage, report_address(run.dag_id, run.run_id))
            if question is None:
                return approve(self.lineage)
        self.subject, self.body = question.subject, question.body
        self.response_timeout = timedelta(hours=question.hours)
        return super().execute(context)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        """Record the answer. If nobody answered in time, Airflow gives the default answer and names no user."""
        user = event["responded_by_user"]
        approved = event["chosen_options"] == [self.APPROVE]
        answer = Answer(approved, user and user["name"], event["responded_at"])
        try:
            return approve(self.lineage, answer)
        except TransientError as error:
            if approved:
                raise
            raise PermanentError(f"not approved; {error.what}", error.do) from error  # a retry would ask again

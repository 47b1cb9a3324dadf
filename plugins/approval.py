"""The task that asks a person, where the recipe wants it, before a candidate is published."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator

from include.errors import PermanentError, TransientError
from plugins.credentials import hub_account
from plugins.links import report_address
from tasks.approve import Answer, approve, ask


class Approval(ApprovalOperator):
    """Airflow's approval, asked only where `tasks.approve` has a question; passes the lineage on.

    It waits in `awaiting_input`, without a worker's slot. Approved, it succeeds; rejected or unanswered, it fails and
    is not tried again. Cleared, it asks anew.

    Args:
        lineage: what `evaluate` returned.
    """

    template_fields = ("lineage",)  # not the question: what a model says is no template

    def __init__(self, *, lineage: Any, **options: Any):
        super().__init__(subject="May this candidate go live?", defaults=self.REJECT, **options)
        self.lineage = lineage
        self.doc_md = approve.__doc__

    def execute(self, context: Any) -> Any:
        """Ask and wait, or pass the lineage on."""
        run = context["dag_run"]
        with hub_account():
            question = ask(self.lineage, report_address(run.dag_id, run.run_id))
            if question is None:
                return approve(self.lineage)
        self.subject, self.body = question.subject, question.body
        self.response_timeout = timedelta(hours=question.hours)
        return super().execute(context)

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        """The answer; where nobody gave one, Airflow has put in the default and names no person."""
        user = event["responded_by_user"]
        approved = event["chosen_options"] == [self.APPROVE]
        answer = Answer(approved, user and user["name"], event["responded_at"])
        try:
            return approve(self.lineage, answer)
        except TransientError as error:
            if approved:
                raise
            raise PermanentError(f"not approved; {error.what}", error.do) from error  # another try would ask again

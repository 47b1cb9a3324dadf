"""Errors that tell a person what is wrong and what to do.

Stages raise these classes only. The class decides whether Airflow retries the task: see `plugins/retry_policy.py`.
"""

from __future__ import annotations


class RetuneError(Exception):
    """Base class of all errors: one sentence about what is wrong, and one about what to do.

    Args:
        what: what is wrong, with the value and the place.
        do: what the reader can do about it; empty if there is nothing to do.
    """

    def __init__(self, what: str, do: str = ""):
        self.what, self.do = what.rstrip(". "), do.rstrip(". ")
        super().__init__(f"{self.what}. {self.do}." if self.do else f"{self.what}.")

    def __reduce__(self):
        return type(self), (self.what, self.do)


class PermanentError(RetuneError):
    """A retry would fail in the same way, for example with a bad recipe or a missing permission."""


class TransientError(RetuneError):
    """A retry may succeed, for example after a network failure or a lost process."""


class BadRecipe(PermanentError):
    """A field of a recipe file, or a value given at trigger time, is wrong. The message names the field."""


class UndeclaredField(PermanentError):
    """A stage reads a recipe field that it does not declare, so that its fingerprint would not cover the field."""


class TooCostly(PermanentError):
    """A chat template needs too much time or memory, or writes too much."""


class BadData(PermanentError):
    """The dataset cannot be used for training."""


class NotFound(PermanentError):
    """A file, folder, dataset, model or version does not exist."""


class NoPermission(PermanentError):
    """The account or the file system does not permit the access."""


class GateRefused(PermanentError):
    """The candidate must not go live: the gate refused it, or the version was rolled back earlier."""


class Rejected(PermanentError):
    """A person rejected the candidate."""


class ApprovalTimeout(PermanentError):
    """The candidate needs a person's approval, and nobody answered in time or nobody could be asked."""


class Conflict(RetuneError):
    """Something changed after an earlier stage read it: another version went live, or a source file changed.

    A retry of the failed stage cannot succeed. A new run can, and so can clearing the earlier stage.
    """


class Damaged(Conflict):
    """A file of an artifact is not what its manifest says. The stage that made the artifact must run again."""


class UpToDate(RetuneError):
    """An earlier run with the same recipe, data and base was published or refused. There is nothing to do."""


class Unreachable(TransientError):
    """A service does not answer."""


class NoSpace(TransientError):
    """A disk is full. A retry may succeed after somebody has freed space."""


class ProcessLost(TransientError):
    """The engine process died or was stopped. A retry continues from the last checkpoint."""


class ProcessTimeout(ProcessLost):
    """The engine process sent no event for too long and was killed."""


class OutOfMemory(ProcessLost):
    """The device's memory is too small for a micro-batch. A retry uses a smaller micro-batch."""

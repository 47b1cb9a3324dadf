"""Errors for people: what is wrong, where, and what to do.

Every stage raises these errors. The class decides whether a retry can help (see `plugins/retry_policy.py`).
"""

from __future__ import annotations


class RetuneError(Exception):
    """A failure, described in one sentence, and what to do about it.

    Args:
        what: what is wrong, with the value and the place.
        do: what the reader can do about it.
    """

    def __init__(self, what: str, do: str = ""):
        self.what, self.do = what.rstrip(". "), do.rstrip(". ")
        super().__init__(f"{self.what}. {self.do}." if self.do else f"{self.what}.")

    def __reduce__(self):
        return type(self), (self.what, self.do)


class PermanentError(RetuneError):
    """A retry would fail in the same way: bad recipe, bad data, refused by the gate, missing permission."""


class TransientError(RetuneError):
    """A retry may succeed: network failure, lost process, missing device."""


class BadRecipe(PermanentError):
    """A recipe file or a value given at trigger time is wrong; the message names the field."""


class UndeclaredField(PermanentError):
    """A stage reads a recipe field that its `recipe_fields` do not name, so that its fingerprint would not cover it."""


class BadData(PermanentError):
    """The dataset cannot be trained on."""


class NotFound(PermanentError):
    """A file, folder, dataset, model or version that was named does not exist."""


class NoPermission(PermanentError):
    """The account or the file system does not allow it."""


class GateRefused(PermanentError):
    """The candidate may not go live: the gate refused it, or a person rolled the same version back."""


class Rejected(PermanentError):
    """A person refused to approve the candidate."""


class ApprovalTimeout(PermanentError):
    """Nobody answered the approval question in time."""


class Conflict(RetuneError):
    """The state that an earlier stage read has changed since: another version went live, or a file has changed.

    A retry of this stage cannot succeed. A new run, or clearing the earlier stage, reads the new state and may succeed.
    """


class UpToDate(RetuneError):
    """A run of the same recipe, data and base was already published or refused, so there is nothing to do."""


class Unreachable(TransientError):
    """A service did not answer."""


class NoSpace(TransientError):
    """A disk is full; space may be free before the next try."""


class ProcessLost(TransientError):
    """The training process died or was stopped; the next try continues from the last checkpoint."""


class ProcessTimeout(ProcessLost):
    """The training process made no progress for `hang_timeout` seconds and was ended."""


class OutOfMemory(ProcessLost):
    """A micro-batch did not fit into the device's memory; the next try uses a smaller one."""

"""Errors for people: what was wrong, where, and what to do.

A stage raises one of these. Whether a retry can help is a property of the class, so that one retry policy decides
for every task (see `dags/finetune.py`).
"""

from __future__ import annotations


class RetuneError(Exception):
    """One clear sentence about a failure.

    Args:
        what: what was wrong, with the value and the place.
        do: what the reader can do about it.
    """

    retryable = False

    def __init__(self, what: str, do: str = ""):
        self.what, self.do = what.rstrip(". "), do.rstrip(". ")
        super().__init__(f"{self.what}. {self.do}." if self.do else f"{self.what}.")

    def __reduce__(self):
        return type(self), (self.what, self.do)


class PermanentError(RetuneError):
    """A retry would fail in the same way: bad recipe, bad data, refused by the gate, missing permission."""


class TransientError(RetuneError):
    """A retry may succeed: the network, a lost process, a device that went away."""

    retryable = True


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
    """The candidate may not go live: the gate did not let it through, or a person has taken it back."""


class Rejected(PermanentError):
    """A person was asked whether the candidate may go live, and said no."""


class ApprovalTimeout(PermanentError):
    """A person was to be asked whether the candidate may go live, and nobody answered."""


class Conflict(RetuneError):
    """The world has moved on since an earlier stage looked: something else went live, a file has changed.

    A new run, or clearing that stage, looks again and may succeed; a retry of this one alone cannot.
    """

    retryable = True


class UpToDate(RetuneError):
    """Recipe, data and base are those of a run whose candidate was published or refused; there is nothing to do."""


class Unreachable(TransientError):
    """A service did not answer."""


class NoSpace(TransientError):
    """A disk is full; somebody may free some space before the next try."""


class ProcessLost(TransientError):
    """The training process died or was told to stop; the next try goes on from its last checkpoint."""


class ProcessTimeout(ProcessLost):
    """The training process gave no sign of life for too long and was ended."""


class OutOfMemory(ProcessLost):
    """The device's memory did not hold a micro-batch; the next try takes a smaller one."""

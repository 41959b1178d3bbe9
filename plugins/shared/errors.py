"""The few error classes of misf, each with the exit code that its commands return."""

from __future__ import annotations


class MisfError(Exception):
    """A known failure: its message is one line that says what was expected, what came and what to do."""

    exit_code = 1


class AccuracyError(MisfError):
    """A model missed the accuracy or precision that was asked of it."""

    exit_code = 3


class EnvironmentMismatch(MisfError):  # noqa: N818 - reads better without "Error" in the exit-code table
    """This machine lacks what a model or a flag asks for: a GPU, a library, a matching version."""

    exit_code = 4

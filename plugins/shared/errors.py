"""Error classes, and the exit codes of all commands."""

from __future__ import annotations

FAILURE = 1
# 2: wrong usage; click's
ACCURACY = 3
ENVIRONMENT = 4
BATCH_FAILURES = 5
"""Some files of a folder failed, the others are done."""
INTERRUPTED = 130
# 143: terminated; 128 and the signal's number


class MisfError(Exception):
    """A known failure: its message is one line that says what was expected, what came and what to do."""

    exit_code = FAILURE


class AccuracyError(MisfError):
    """A model missed the required accuracy or precision."""

    exit_code = ACCURACY


class EnvironmentMismatch(MisfError):  # noqa: N818 - reads better without "Error" in the exit-code table
    """This machine lacks what a model or a flag needs: a GPU, a library, a matching version."""

    exit_code = ENVIRONMENT


class OutOfMemory(MisfError):  # noqa: N818 - as above
    """A picture needs more memory than is free."""

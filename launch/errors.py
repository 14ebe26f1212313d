"""Errors that end a run with one sentence instead of a traceback."""


class RunError(Exception):
    """Something outside the program went wrong, such as a full disk; the run ends with exit status 1."""

    status = 1


class UsageError(RunError):
    """The request cannot be met; the sentence names the value and what would be right. Exit status 2."""

    status = 2

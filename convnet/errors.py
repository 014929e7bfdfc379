"""The two errors a user meets; entry points turn them into a message and a status.

Everything that can go wrong for a reason that the user can mend is raised as one of
these, with a message that names the file or key, its value and the way out.
"""


class ConvnetError(Exception):
    """The job failed (exit status 1). The message is the whole text the user sees."""


class UsageError(ConvnetError):
    """A wrong flag, key, class or path on the command line (exit status 2)."""

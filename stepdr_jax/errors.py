"""The exception for problems that the user can fix.

Raise `UserError` where the program meets a config, a file, a port, an RPC or a disk. Its text says what was expected,
what was found, where, and what to change; `launch.entry` prints it as one line without a stack trace. Any other
exception is a bug and keeps its trace.
"""


class UserError(Exception):
    """A problem whose fix is outside the code; the message says how to fix it."""

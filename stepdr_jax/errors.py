"""The one exception that means "the person at the keyboard can fix this".

Raise `UserError` at an edge (config, file, port, RPC, disk). Its text says what was expected, what came, where, and
what to change; `launch.entry` prints it as one line without a stack trace. Anything else is a bug and keeps its trace.
"""


class UserError(Exception):
    """A problem whose fix is outside the code; the message names the fix."""

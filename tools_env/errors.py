"""Failures by who can act on them: the person (ToolHostError), the model (the outcomes), the client (RetryLater)."""


class ToolHostError(Exception):
    """The person at the keyboard can fix this: a port, a path, a world. The message names the fix."""


class ToolError(Exception):
    """A tool could not do what was asked; the model reads the message (outcome `tool_error`)."""


class BadArguments(Exception):
    """The arguments do not fit the tool's schema; the model reads the message (outcome `bad_arguments`)."""


class RetryLater(Exception):
    """The service is full (gRPC RESOURCE_EXHAUSTED); `retry_seconds` says when to come back."""

    def __init__(self, message: str, retry_seconds: float):
        super().__init__(message)
        self.retry_seconds = retry_seconds


class UnknownSession(Exception):
    """The session was never opened here, was closed, or its lease ended (gRPC NOT_FOUND)."""


class CallIdReused(Exception):
    """A call id came back with another tool or other arguments (gRPC INVALID_ARGUMENT)."""


class CallUnfinished(Exception):
    """A call with effects began and was cut off; repeating it could do its work twice (gRPC ABORTED)."""


class Unavailable(Exception):
    """A part that the service needs does not answer (gRPC UNAVAILABLE); clients retry."""

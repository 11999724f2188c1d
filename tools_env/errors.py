"""Exceptions, grouped by who can act on them: the operator, the model (outcomes) or the client (gRPC statuses)."""


class ToolHostError(Exception):
    """An error that the operator can fix, such as a port or a path. The message says how to fix it."""


class ToolError(Exception):
    """A tool could not do what the model asked; the model reads the message (outcome `tool_error`)."""


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
    """A call id was used again with another tool or other arguments (gRPC INVALID_ARGUMENT)."""


class CallUnfinished(Exception):
    """A call with side effects began and was interrupted; repeating it could apply them twice (gRPC ABORTED)."""


class Unavailable(Exception):
    """A dependency of the service does not answer (gRPC UNAVAILABLE); clients retry."""

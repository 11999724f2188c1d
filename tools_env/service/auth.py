"""Authentication: bearer tokens, checked before any handler runs, and TLS with or without client certificates.

The health check needs no token, because load balancers have none.
"""

import hmac
from pathlib import Path

import grpc

from tools_env.errors import ToolHostError

OPEN_SERVICES = ("/grpc.health.v1.Health/",)
LOOPBACK = ("127.", "localhost", "[::1]", "::1")


class BearerTokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without `authorization: Bearer <token>`.

    `tokens`: one token, or several separated by commas for a rotation.
    """

    def __init__(self, tokens: str):
        self._expected = [f"Bearer {token.strip()}".encode() for token in tokens.split(",") if token.strip()]
        if not self._expected:
            raise ToolHostError("the bearer token is empty; set one, or unset its variable")

    async def intercept_service(self, continuation, handler_call_details):
        if handler_call_details.method.startswith(OPEN_SERVICES):
            return await continuation(handler_call_details)
        given = str(dict(handler_call_details.invocation_metadata).get("authorization", "")).encode()
        # All tokens are compared, so that the time does not depend on which one matches.
        if any([hmac.compare_digest(given, expected) for expected in self._expected]):
            return await continuation(handler_call_details)

        async def refuse(request, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong bearer token")

        return grpc.unary_unary_rpc_method_handler(refuse)


def server_credentials(cert: str, key: str, client_ca: str | None) -> grpc.ServerCredentials:
    """Returns TLS credentials from PEM files; with `client_ca`, clients need a certificate that it signed.

    Raises ToolHostError."""
    pair = (_pem(key), _pem(cert))
    authority = _pem(client_ca) if client_ca else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def check_exposure(host: str, token: str | None, client_ca: str | None, anyone: bool) -> None:
    """Raises ToolHostError when a host is reachable from other machines without a token or mTLS."""
    if not (host.startswith(LOOPBACK) or token or client_ca or anyone):
        raise ToolHostError(
            f"{host} can be reached from other machines and callers would not be authenticated; "
            "set $STEPDR_TOOLS_TOKEN "
            "or --tls_client_ca, listen on 127.0.0.1, or set --allow_anyone"
        )


def _pem(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ToolHostError(f"cannot read {path}: {error.strerror}; name a PEM file") from None

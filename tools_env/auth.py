"""Bearer token check, before any handler runs. The health check stays open: load balancers carry no token."""

import hmac

import grpc

OPEN_SERVICES = ("/grpc.health.v1.Health/",)


class BearerToken(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without `authorization: Bearer <token>`."""

    def __init__(self, token: str):
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation, handler_call_details):
        if handler_call_details.method.startswith(OPEN_SERVICES):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(str(given).encode(), self._expected):
            return await continuation(handler_call_details)

        async def refuse(request, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong bearer token")

        return grpc.unary_unary_rpc_method_handler(refuse)

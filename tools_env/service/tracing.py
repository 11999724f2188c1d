"""OpenTelemetry tracing: one server span per RPC, exported by OTLP over gRPC. Imported only with `--otlp_endpoint`.

The caller's W3C `traceparent` is the parent of the span, and a worker that forwards a call sends its own span as the
parent. Names follow the OpenTelemetry conventions for RPC and for generative AI.
"""

import asyncio
import contextvars
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import grpc

from tools_env.errors import ToolHostError

SERVICE = "/stepdr.tools.v1.ToolService/"
NAMES = ("traceparent", "tracestate")  # metadata of the W3C trace context
SHUTDOWN = 5.0  # seconds to export the last spans
_SPAN_ATTRIBUTES: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("notes", default=None)


def annotate_span(**attributes: Any) -> None:
    """Adds attributes, named without their prefix `stepdr.`, to the span of the current RPC, if there is one."""
    notes = _SPAN_ATTRIBUTES.get()
    if notes is not None:
        notes.update((f"stepdr.{name}", value) for name, value in attributes.items())


def outgoing_trace_context(given: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Returns metadata with the trace context of the current span, or else with the one in `given`."""
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        if carrier:
            return list(carrier.items())
    return [(name, given[name]) for name in NAMES if given and name in given]


class SpanInterceptor(grpc.aio.ServerInterceptor):
    """Records the spans. Health checks and reflection have none."""

    def __init__(self, endpoint: str, worker: int = 0):
        """`endpoint`: http://host:port or https://host:port of a collector. Raises ToolHostError."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ToolHostError("otlp_endpoint needs OpenTelemetry; pip install .[telemetry]") from None
        if not endpoint.startswith(("http://", "https://")):
            raise ToolHostError(f"expected otlp_endpoint as http://host:port or https://host:port, got {endpoint!r}")
        resource = Resource.create({"service.name": "stepdr-tools", "service.instance.id": str(worker)})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=SHUTDOWN)))
        self._tracer = self._provider.get_tracer("tools_env")

    async def close(self) -> None:
        """Exports the last spans within SHUTDOWN seconds, so that an unreachable collector does not delay the stop."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        end = time.monotonic() + SHUTDOWN
        while thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def intercept_service(self, continuation, handler_call_details):
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(SERVICE):
            return handler
        method = handler_call_details.method.removeprefix(SERVICE)

        async def run(request, context):
            return await self._spanned(method, handler.unary_unary, request, context)

        return grpc.unary_unary_rpc_method_handler(run, handler.request_deserializer, handler.response_serializer)

    async def _spanned(self, method: str, answer, request, context):
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        given = dict(context.invocation_metadata() or ())
        parent = TraceContextTextMapPropagator().extract({name: given[name] for name in NAMES if name in given})
        attributes = {"rpc.system": "grpc", "rpc.service": SERVICE.strip("/"), "rpc.method": method}
        for field, name in (
            ("session_id", "stepdr.session"),
            ("call_id", "gen_ai.tool.call.id"),
            ("tool", "gen_ai.tool.name"),
            ("episode_id", "stepdr.episode"),
        ):
            if value := getattr(request, field, ""):
                attributes[name] = value[:200]
        notes: dict[str, Any] = {}
        mark = _SPAN_ATTRIBUTES.set(notes)
        with self._tracer.start_as_current_span(
            f"{SERVICE.strip('/')}/{method}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                reply = await answer(request, context)
                if method == "CallTool":
                    outcome = type(reply).DESCRIPTOR.fields_by_name["outcome"].enum_type.values_by_number[reply.outcome]
                    notes["stepdr.outcome"] = outcome.name.removeprefix("OUTCOME_").lower()
                    notes["stepdr.cache_hit"] = reply.cache_hit
                span.set_attribute("rpc.grpc.status_code", 0)
                return reply
            except BaseException:
                code = context.code() or grpc.StatusCode.CANCELLED
                number = code.value[0] if isinstance(code, grpc.StatusCode) else int(code)
                span.set_attribute("rpc.grpc.status_code", number)
                span.set_status(Status(StatusCode.ERROR, getattr(code, "name", str(code))))
                raise
            finally:
                span.set_attributes(notes)
                _SPAN_ATTRIBUTES.reset(mark)

"""Routes calls to the worker process that has the session. Any worker accepts any call and forwards those of other
workers.

Workers connect to each other over Unix sockets in a folder that only their user can enter. A session opens at the
worker that its request id hashes to, so a repeated OpenSession finds its session over any connection.
"""

import zlib
from pathlib import Path

import grpc

from tools_env.protocol import tools_pb2_grpc
from tools_env.service import tracing
from tools_env.service.service import ToolService
from tools_env.service.sessions import owning_worker

FORWARDED = "stepdr-passed-on"  # metadata of a forwarded call, which is not forwarded again
_OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]


def worker_socket(folder: str, worker: int) -> str:
    return f"unix:{Path(folder) / f'{worker}.sock'}"


class RoutedService(tools_pb2_grpc.ToolServiceServicer):
    """The service of worker number `worker` of `workers`."""

    def __init__(self, local: ToolService, socket_dir: str, worker: int, workers: int):
        self._local = local
        self._worker = worker
        self._workers = workers
        self._channels = {
            peer: grpc.aio.insecure_channel(worker_socket(socket_dir, peer), options=_OPTIONS)
            for peer in range(workers)
            if peer != worker
        }
        self._stubs = {peer: tools_pb2_grpc.ToolServiceStub(channel) for peer, channel in self._channels.items()}

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def ListTools(self, request, context):
        return await self._local.ListTools(request, context)

    async def OpenSession(self, request, context):
        place = zlib.crc32(request.request_id.encode()) % self._workers if request.request_id else self._worker
        return await self._at(place, "OpenSession", request, context)

    async def CallTool(self, request, context):
        return await self._at(owning_worker(request.session_id, self._workers), "CallTool", request, context)

    async def CloseSession(self, request, context):
        return await self._at(owning_worker(request.session_id, self._workers), "CloseSession", request, context)

    async def _at(self, worker: int | None, method: str, request, context):
        given = dict(context.invocation_metadata() or ())
        if worker is None or worker == self._worker or FORWARDED in given:
            return await getattr(self._local, method)(request, context)
        metadata = [(FORWARDED, "1"), *tracing.outgoing_trace_context(given)]
        if "authorization" in given:
            metadata.append(("authorization", given["authorization"]))
        tracing.annotate_span(passed_to=worker)
        try:
            call = getattr(self._stubs[worker], method)
            return await call(request, timeout=context.time_remaining(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            trailing = [
                (key, value) for key, value in error.trailing_metadata() or () if not key.startswith("grpc-message")
            ]
            details = error.details()
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                details = f"worker {worker}, which has this session, does not answer; it is restarted"
            await context.abort(error.code(), details, tuple(trailing))

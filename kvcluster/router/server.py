"""The gRPC server: listener, limits, health and reflection around `InferenceService`."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from kvcluster.config import RouterConfig
from kvcluster.engine.api import Backend
from kvcluster.router.auth import Authenticator, InsecureLocal
from kvcluster.router.calls import CallWrapper
from kvcluster.router.contexts import ContextService
from kvcluster.router.listener import bind, checked_address, host_and_port, server_options
from kvcluster.router.open_calls import OpenCalls
from kvcluster.router.routing import Routes
from kvcluster.router.service import InferenceService
from kvcluster.router.tls import ListenerTls
from kvcluster.rpc.v1 import context_service_pb2 as context_pb
from kvcluster.rpc.v1 import inference_service_pb2 as pb

CONTEXT_SERVICE_NAME = context_pb.DESCRIPTOR.services_by_name["ContextService"].full_name
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class RouterServer:
    """One listener in front of `backends`. Start and stop it in the event loop that serves it."""

    def __init__(
        self,
        backends: Sequence[Backend],
        config: RouterConfig,
        *,
        authenticator: Authenticator | None = None,
        open_calls: OpenCalls | None = None,
        tls: ListenerTls | None = None,
        health_interval_s: float = 1.0,
        status_timeout_s: float = 5.0,
    ) -> None:
        """`authenticator`: None lets everybody in, as `config` then has to say. `tls`: None serves
        unencrypted, on loopback.

        Raises ConfigError when `config` would let strangers in.
        """
        self._address = checked_address(
            config, has_keys=authenticator is not None, has_tls=tls is not None
        )
        self._tls = tls
        self._config = config
        self._authenticator = authenticator or InsecureLocal()
        self._open_calls = open_calls or OpenCalls()
        self._health_interval_s = health_interval_s
        self._routes = Routes(backends, status_timeout_s=status_timeout_s)
        self._health = health.aio.HealthServicer()
        self._server: aio.Server | None = None
        self._watching: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """HOST:PORT as bound. Valid after `start`."""
        return host_and_port(self._address, self._port)

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError when the address cannot be bound."""
        self._server = aio.server(options=server_options(self._config))
        wrap = CallWrapper(
            self._authenticator,
            self._open_calls,
            max_message_bytes=self._config.max_message_bytes,
            max_unary_calls=self._config.max_unary_calls,
            write_timeout_s=self._config.write_timeout_s,
        )
        self._server.add_generic_rpc_handlers(
            (self._inference_handler(wrap), self._context_handler(wrap))
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, CONTEXT_SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self.publish_health()
        self._port = bind(self._server, "router.listen", self._config.listen, self._tls)
        await self._server.start()
        self._watching = asyncio.create_task(self._watch_health())

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls, give running ones `grace_s` to end, then cancel them."""
        if self._server is None:
            return
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    def _context_handler(self, wrap: CallWrapper) -> grpc.GenericRpcHandler:
        service = ContextService(
            self._routes, upload_idle_timeout_s=self._config.upload_idle_timeout_s
        )
        return grpc.method_handlers_generic_handler(
            CONTEXT_SERVICE_NAME,
            {
                "UploadContext": wrap.client_stream(
                    context_pb.UploadContextRequest, service.upload
                ),
                "GetContext": wrap.unary(context_pb.GetContextRequest, service.get),
                "ListContexts": wrap.unary(context_pb.ListContextsRequest, service.list),
                "UpdateContext": wrap.unary(context_pb.UpdateContextRequest, service.update),
                "ForkContext": wrap.unary(context_pb.ForkContextRequest, service.fork),
                "DeleteContext": wrap.unary(context_pb.DeleteContextRequest, service.delete),
            },
        )

    def _inference_handler(self, wrap: CallWrapper) -> grpc.GenericRpcHandler:
        service = InferenceService(
            self._routes, upload_idle_timeout_s=self._config.upload_idle_timeout_s
        )
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": wrap.server_stream(pb.GenerateRequest, service.generate),
                "StreamGenerate": wrap.two_way_stream(
                    pb.StreamGenerateRequest, service.stream_generate
                ),
                "ResumeGeneration": wrap.server_stream(
                    pb.ResumeGenerationRequest, service.resume_generation
                ),
                "GetGeneration": wrap.unary(pb.GetGenerationRequest, service.get_generation),
                "ListGenerations": wrap.unary(pb.ListGenerationsRequest, service.list_generations),
                "CancelGeneration": wrap.unary(
                    pb.CancelGenerationRequest, service.cancel_generation
                ),
                "CountTokens": wrap.unary(pb.CountTokensRequest, service.count_tokens),
                "EstimateGeneration": wrap.unary(
                    pb.EstimateGenerationRequest, service.estimate_generation
                ),
                "ListModels": wrap.unary(pb.ListModelsRequest, service.list_models),
            },
        )

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(self._health_interval_s)
            await self.publish_health()

    async def publish_health(self) -> None:
        """Ask the engines now, and say what they answer."""
        await self._routes.refresh()
        status = health_pb2.HealthCheckResponse.ServingStatus
        current = status.SERVING if self._routes.is_ready else status.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, current)

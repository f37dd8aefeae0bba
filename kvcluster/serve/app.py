"""`kvcluster serve`: a router deployment in front of an engine deployment, on Ray Serve.

    client ── gRPC ── Ingress ── handle ── Replica ── actor calls ── Worker 0 … N-1

Serve places, counts and restarts the two; the ring group inside the replica is our own.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from kvcluster import log
from kvcluster.config import ClusterConfig
from kvcluster.config_access import check_together
from kvcluster.errors import ConfigError, ErrorRecord, from_record
from kvcluster.model.source import find_model
from kvcluster.router.listener import checked_address
from kvcluster.serve.ingress import Ingress
from kvcluster.serve.replica import Replica

APP_NAME = "kvcluster"

_SPARE_CPUS = 2
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Blocks never go through Ray's object store, so a local cluster gets a small one."""
_MAX_CALLS = 100_000
"""Limits are ours, per tenant and typed: Serve must not queue or refuse first."""
_DRAIN_S = 60.0
_STOP_S = 10.0
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""One line a call would be a line a chunk; our own events say what happened."""

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class RunningApp:
    """A cluster that serves, with handles to its two deployments."""

    address: str
    """HOST:PORT of the router."""
    admin_address: str
    """HOST:PORT of its admin port; empty: there is none."""
    ingress: "DeploymentHandle[Any]"
    engine: "DeploymentHandle[Any]"


def run(config: ClusterConfig, on_ready: "Callable[[RunningApp], None]") -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready` gets the cluster once it serves.

    Raises: ConfigError, ModelError, RankLost: what kept the cluster from serving.
    """
    stopping = threading.Event()
    with running(config) as app:
        # Not earlier: Ray puts its own in place when it starts.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        on_ready(app)
        stopping.wait()
        logger.info("draining", listen=app.address)
        try:
            app.engine.drain.remote().result(timeout_s=_DRAIN_S)
        except TimeoutError:
            logger.warning("drain_cut_short", after_s=_DRAIN_S)


@contextmanager
def running(config: ClusterConfig) -> Iterator[RunningApp]:
    """A cluster that serves inside the `with` block. Uses the Ray cluster that this process is
    connected to; else connects to `config.ray_address` or starts one, and ends it afterwards."""
    check_together(config.tls, config.oidc, has_tenants=bool(config.tenancy.database))
    checked_address(config.router, has_keys=bool(config.tenancy.database), has_tls=config.tls.is_on)
    find_model(config.model, needs_weights=config.weights != "random")
    owns_ray = not ray.is_initialized()
    if owns_ray:
        _connect_ray(config)
    try:
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        try:
            engine_app = _deployment("engine", Replica).bind(config)
            ingress_app = _deployment("ingress", Ingress).bind(config, engine_app)
            ingress = serve.run(ingress_app, name=APP_NAME, route_prefix=None)
            engine = serve.get_deployment_handle("engine", APP_NAME)
            try:
                _raise_refusal(engine.startup.remote().result())
                address = ingress.startup.remote().result()
                _raise_refusal(address)
                admin_address = ingress.admin_address.remote().result()
                yield RunningApp(address, admin_address, ingress, engine)
            finally:
                ingress.stop.remote(_STOP_S).result()
                engine.stop.remote().result()
        finally:
            # A Ray cluster that goes on without us must not keep our deployments.
            if config.ray_address or not owns_ray:
                serve.delete(APP_NAME)
    finally:
        if owns_ray:
            stop_ray()


def _deployment(name: str, body: type) -> serve.Deployment:
    decorate = serve.deployment(
        name=name,
        num_replicas=1,
        max_ongoing_requests=_MAX_CALLS,
        graceful_shutdown_timeout_s=_STOP_S,
        ray_actor_options={"num_cpus": 0},
        logging_config=_QUIET,
    )
    return decorate(body)


def _connect_ray(config: ClusterConfig) -> None:
    if config.ray_address:
        try:
            ray.init(address=config.ray_address, log_to_driver=True)
        except ConnectionError as error:
            raise ConfigError(
                f"ray_address: no Ray cluster answers at {config.ray_address!r}"
            ) from error
        return
    start_local_ray(config.ring.num_ranks)


def start_local_ray(num_ranks: int) -> None:
    """Start Ray on this machine alone, with room for so many ranks. End it with `stop_ray`."""
    ray.init(
        address="local",
        num_cpus=max(len(os.sched_getaffinity(0)), num_ranks) + _SPARE_CPUS,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def stop_ray() -> None:
    """Leave the Ray cluster, and end it where this process started it."""
    ray.shutdown()


def _raise_refusal(answer: object) -> None:
    if isinstance(answer, ErrorRecord):
        raise from_record(answer)

"""Puts an engine together: what it owns, what it knows of the model, and its ring group."""

from typing import Protocol

from kvcluster.attention.strategy import choose_route
from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.capacity import block_bytes_per_group, blocks_per_group
from kvcluster.cache.partitions import CachePartitions
from kvcluster.codec.registry import CODEC_METHODS, SHARING_METHODS
from kvcluster.config import ClusterConfig
from kvcluster.engine.driver import Executor, SystemClock, random_id
from kvcluster.engine.engine import Engine
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.service import EngineService
from kvcluster.engine.spill_plan import SpillRanks
from kvcluster.engine.text import Tokenizer
from kvcluster.model.codecs import calibration_for, codec_layouts, measured_table, table_mismatch
from kvcluster.policy import Menu
from kvcluster.retention.offered import RETENTION_METHODS
from kvcluster.selection.offered import SELECTION_METHODS
from kvcluster.serve.refusals import PolicyChecks
from kvcluster.serve.stores import store_parts
from kvcluster.types import ModelSpec, TenantId


class RingExecutor(Executor, SpillRanks, Protocol):
    """A ring group as an engine that keeps contexts off the GPUs sees it."""


def engine_service(
    config: ClusterConfig,
    spec: ModelSpec,
    executor: RingExecutor,
    *,
    nodes: list[str],
    epoch: int,
    tokenizer: Tokenizer | None,
) -> EngineService:
    """An engine over a started ring group, not yet running. Tenants get their
    shares from the routers. Raises: ConfigError for folders of contexts that cannot be used."""
    num_blocks = blocks_per_group(spec, config.cache, config.engine)
    pools = [[BlockPool(count) for count in num_blocks] for _ in range(config.ring.num_ranks)]
    calibration = calibration_for(spec, config.calibration) if config.calibration else None
    layouts = codec_layouts(spec, calibration)
    table = None if calibration is None else measured_table(calibration)
    unmeasured = "" if table is None else table_mismatch(table, config.cache)
    checks = PolicyChecks(spec, config.cache.block_size, layouts)
    parts = EngineParts(
        spec=spec,
        cache=config.cache,
        config=config.engine,
        partitions=CachePartitions(
            pools,
            block_bytes=block_bytes_per_group(spec, config.cache.block_size),
            encoded_per_page=checks.encoded_per_page,
            exact_recent=config.cache.exact_recent_blocks,
            encoded_step=lambda codec: layouts.encoded_step(
                codec, config.cache.exact_recent_blocks
            ),
        ),
        stores=store_parts(config, executor),
        choose_route=choose_route,
        menu=Menu((*SHARING_METHODS, *CODEC_METHODS, *RETENTION_METHODS, *SELECTION_METHODS)),
        refusal=checks.refusal,
        recipes=() if table is None or unmeasured else table.recipes,
        unmeasured=unmeasured,
        default_policy=config.default_policy,
        tenant_policies={
            TenantId(tenant): policy for tenant, policy in config.tenant_policies.items()
        },
        tokenizer=tokenizer,
        clock=SystemClock(),
        new_id=random_id,
    )
    return EngineService(Engine(parts, epoch=epoch), executor, nodes=nodes)

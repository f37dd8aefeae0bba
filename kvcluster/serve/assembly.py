"""Puts an engine together: what it owns, what it knows of the model, and its ring group."""

from kvcluster.attention.strategy import choose_route
from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.capacity import blocks_per_group
from kvcluster.cache.encoded_pages import blocks_per_page
from kvcluster.cache.partition import Partition
from kvcluster.config import ClusterConfig
from kvcluster.engine.driver import Executor, SystemClock, random_id
from kvcluster.engine.engine import Engine
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.service import EngineService
from kvcluster.engine.text import Tokenizer
from kvcluster.retention.registry import RETENTIONS
from kvcluster.types import DEFAULT_TENANT, EXACT, ModelSpec


def engine_service(
    config: ClusterConfig,
    spec: ModelSpec,
    executor: Executor,
    *,
    nodes: list[str],
    epoch: int,
    tokenizer: Tokenizer | None,
) -> EngineService:
    """An engine over a started ring group, not yet running. One tenant holds all blocks."""
    num_blocks = blocks_per_group(spec, config.cache, config.engine)
    pools = [[BlockPool(count) for count in num_blocks] for _ in range(config.ring.num_ranks)]
    encoded_per_page = blocks_per_page(spec, config.cache.block_size)
    parts = EngineParts(
        spec=spec,
        cache=config.cache,
        config=config.engine,
        partition=Partition(pools, tenant=DEFAULT_TENANT, encoded_per_page=encoded_per_page),
        choose_route=choose_route,
        codecs=(EXACT, *encoded_per_page),
        retentions=RETENTIONS,
        tokenizer=tokenizer,
        clock=SystemClock(),
        new_id=random_id,
    )
    return EngineService(Engine(parts, epoch=epoch), executor, nodes=nodes)

"""A server to attack: real ports, tenants in a real database, a real engine on a fake ring."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from kvcluster.audit.attack import Attack, Outcome
from kvcluster.audit.scene import Target, staged
from kvcluster.config import CacheConfig, EngineConfig, RouterConfig, TenancyConfig
from kvcluster.config_access import OidcConfig
from kvcluster.engine.api import Backend
from kvcluster.policy import Menu
from kvcluster.retention.offered import RETENTION_METHODS
from kvcluster.router.front_door import FrontDoor
from tests.fake_engine import FakeCluster, model_spec
from tests.unit.engine.serving import serve
from tests.unit.router.administering import bootstrap

NUM_SAMPLES = 12
PROMPT_TOKENS = 24


@asynccontextmanager
async def real_engine() -> AsyncIterator[Backend]:
    fake = FakeCluster(
        spec=model_spec(eos_token_ids=()),
        cache=CacheConfig(block_size=8, exact_recent_tokens=0),
        config=EngineConfig(prefill_chunk_tokens=256, shard_min_tokens=16),
        num_blocks=4096,
        menu=Menu(RETENTION_METHODS),
    )
    async with aclosing(serve(fake)) as serving:
        async for served in serving:
            yield served.service


@asynccontextmanager
async def attacked(
    folder: Path, backend: Backend, *, oidc: OidcConfig | None = None, **router: object
) -> AsyncIterator[Target]:
    database = folder / "tenants.sqlite"
    secret = bootstrap(database)
    door = FrontDoor(
        [backend],
        RouterConfig(listen="127.0.0.1:0", **router),  # type: ignore[arg-type]
        TenancyConfig(database=str(database), admin_listen="127.0.0.1:0"),
        oidc=oidc,
    )
    try:
        await door.start()
        yield Target(
            address=door.address,
            admin_address=door.admin_address,
            operator=secret,
            num_samples=NUM_SAMPLES,
            prompt_tokens=PROMPT_TOKENS,
            patience_s=5.0,
        )
    finally:
        await door.stop(grace_s=0)


async def outcome_of(
    attack: Attack,
    folder: Path,
    backend: Backend | None = None,
    *,
    oidc: OidcConfig | None = None,
    num_samples: int = NUM_SAMPLES,
    **router: object,
) -> Outcome:
    """What comes of one attack on a server in front of `backend`; None: of a real engine."""
    if backend is None:
        async with real_engine() as engine:
            return await outcome_of(
                attack, folder, engine, oidc=oidc, num_samples=num_samples, **router
            )
    serving = attacked(folder, backend, oidc=oidc, **router)
    async with serving as target, staged(replace(target, num_samples=num_samples)) as scene:
        return await attack.run(scene)

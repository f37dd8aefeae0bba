"""Data keys come from the routers, and only what they say destroys anything."""

from kvcluster.cache.spill import SealedContext, SpillOwner
from kvcluster.engine.tenant_keys import TenantKeys
from kvcluster.tenancy.limits import Partitions
from kvcluster.tenancy.shares import TenantShare, TenantShares
from kvcluster.types import TenantId

RED = TenantId("red")
KEY = bytes(32)


def pushed(
    revision: int,
    keys: dict[int, bytes] | None,
    uid: str = "uid-1",
    deleted: tuple[tuple[TenantId, str], ...] = (),
) -> TenantShares:
    share = TenantShare(tenant=RED, partitions=Partitions(), tenant_uid=uid, data_keys=keys)
    return TenantShares(revision=revision, shares=() if deleted else (share,), deleted=deleted)


def sealed(key_version: int = 1, uid: str = "uid-1") -> SealedContext:
    return SealedContext(
        spill="s",
        owner=SpillOwner(tenant=RED, tenant_uid=uid, context="c"),
        num_parts=1,
        num_bytes=1,
        key_version=key_version,
        create_time_s=0.0,
    )


def test_a_newer_push_holds_and_an_older_one_changes_nothing() -> None:
    keys = TenantKeys()

    assert keys.apply(pushed(5, {1: KEY, 2: KEY}))
    assert not keys.apply(pushed(5, {1: KEY}))
    assert not keys.apply(pushed(4, {1: KEY}))
    ring = keys.of(RED)
    assert ring is not None
    assert set(ring.keys) == {1, 2}


def test_keys_that_cannot_be_read_now_are_those_of_before() -> None:
    keys = TenantKeys()
    keys.apply(pushed(1, {1: KEY}))
    keys.apply(pushed(2, None))

    assert keys.of(RED) is not None
    assert not keys.are_destroyed(sealed())


def test_a_version_that_is_gone_was_destroyed() -> None:
    keys = TenantKeys()
    keys.apply(pushed(1, {2: KEY}))

    assert keys.are_destroyed(sealed(1))
    assert not keys.are_destroyed(sealed(2))


def test_what_a_deleted_or_an_earlier_tenant_of_the_name_sealed_was_destroyed() -> None:
    deleted, later = TenantKeys(), TenantKeys()
    deleted.apply(pushed(1, None, deleted=((RED, "uid-1"),)))
    later.apply(pushed(1, {1: KEY}, uid="uid-2"))

    assert deleted.are_destroyed(sealed())
    assert not deleted.are_destroyed(sealed(uid="uid-0"))
    assert later.are_destroyed(sealed())


def test_of_a_tenant_that_nobody_knows_nothing_was_destroyed() -> None:
    keys = TenantKeys()

    assert not keys.are_destroyed(sealed())
    keys.apply(TenantShares(revision=3))
    assert not keys.are_destroyed(sealed())
    assert keys.of(RED) is None


def test_a_push_shows_no_key() -> None:
    assert "data_keys" not in repr(pushed(1, {1: bytes(range(32))}))

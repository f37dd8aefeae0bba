"""Three tenants offload, restore, rotate, erase, delete and restart in any order: nobody reads what
is another's or was destroyed, and every byte is counted."""

import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcluster.cache.saved import SavedCache
from kvcluster.cache.spill import SealedContext, SpillOwner
from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_parts import read_parts, write_part
from kvcluster.errors import SealedCacheErased, SealedCacheUnknown, SpillError
from kvcluster.types import TenantId
from tests.unit.cache.test_spill import part

SHAPES = (((0,), (1, 3)), ((4, 5), (2,)), ((), ()))
tenants = st.sampled_from(["red", "blue", "green"])
contexts = st.sampled_from(["c1", "c2"])


class Tenant:
    def __init__(self) -> None:
        self.uid = secrets.token_hex(4)
        self.keys = {1: secrets.token_bytes(32)}
        self.last = 1


class SpillMachine(RuleBasedStateMachine):
    """`kept`: what each context's newest offload was, and what it held; the oracle."""

    @initialize()
    def begin(self) -> None:
        # In memory where there is such a folder: what is checked here is no fsync.
        where = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(tempfile.mkdtemp(dir=where))
        self.tier = self._opened()
        self.tenants = {name: Tenant() for name in ("red", "blue", "green")}
        self.kept: dict[tuple[str, str], tuple[SealedContext, Sequence[SavedCache]]] = {}
        self.gone: list[SealedContext] = []

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
            shutil.rmtree(self.folder)

    def _opened(self) -> SpillDisk:
        return SpillDisk(self.folder / "spill", self.folder / "index")

    def _owner(self, tenant: str, context: str) -> SpillOwner:
        uid = self.tenants[tenant].uid
        return SpillOwner(tenant=TenantId(tenant), tenant_uid=uid, context=context)

    @rule(tenant=tenants, context=contexts, num_parts=st.integers(1, 3), is_kept=st.booleans())
    def offload(self, tenant: str, context: str, num_parts: int, is_kept: bool) -> None:
        owner, keys = self._owner(tenant, context), self.tenants[tenant].keys
        if not keys:
            with pytest.raises(SealedCacheErased):
                self.tier.begin(owner, keys, num_parts=num_parts)
            return
        parts = [part(*SHAPES[n], seed=secrets.randbits(30)) for n in range(num_parts)]
        ticket = self.tier.begin(owner, keys, num_parts=num_parts)
        receipts = [write_part(ticket, number, saved) for number, saved in enumerate(parts)]
        if not is_kept:
            self.tier.abandon(ticket)
            return
        earlier = self.kept.get((tenant, context))
        self.gone += [earlier[0]] if earlier else []
        self.kept[tenant, context] = (self.tier.commit(ticket, receipts, keys), parts)

    @rule(tenant=tenants, context=contexts)
    def restore(self, tenant: str, context: str) -> None:
        if (tenant, context) not in self.kept:
            return
        sealed, parts = self.kept[tenant, context]
        keys = self.tenants[tenant].keys
        if sealed.key_version not in keys:
            with pytest.raises(SealedCacheErased):
                self.tier.open(sealed.owner, sealed.spill, keys)
            return
        found = read_parts(self.tier.open(sealed.owner, sealed.spill, keys))
        first = parts[0].tensors["0.1.exact.values"]
        assert torch.equal(found.tensors["0.1.exact.values"][: len(first)], first)

    @rule(tenant=tenants, context=contexts, thief=tenants)
    def steal(self, tenant: str, context: str, thief: str) -> None:
        if (tenant, context) not in self.kept or thief == tenant:
            return
        sealed, _ = self.kept[tenant, context]
        for owner in (self._owner(thief, context), sealed.owner):
            with pytest.raises(SpillError):
                self.tier.open(owner, sealed.spill, self.tenants[thief].keys)

    @rule()
    def read_what_is_gone(self) -> None:
        for sealed in self.gone[-3:]:
            keys = self.tenants[sealed.owner.tenant].keys
            with pytest.raises(SealedCacheUnknown):
                self.tier.open(sealed.owner, sealed.spill, keys)

    @rule(tenant=tenants, context=contexts)
    def delete(self, tenant: str, context: str) -> None:
        if (tenant, context) in self.kept:
            sealed, _ = self.kept.pop((tenant, context))
            self.tier.delete(sealed.owner, sealed.spill)
            self.gone.append(sealed)

    @rule(tenant=tenants, erases=st.booleans())
    def rotate(self, tenant: str, erases: bool) -> None:
        owner = self.tenants[tenant]
        owner.last += 1
        fresh = {owner.last: secrets.token_bytes(32)}
        owner.keys = fresh if erases else owner.keys | fresh

    @rule(tenant=tenants)
    def delete_tenant(self, tenant: str) -> None:
        own = [name for name in self.kept if name[0] == tenant]
        self.gone += [self.kept.pop(name)[0] for name in own]
        assert self.tier.delete_all(TenantId(tenant), self.tenants[tenant].uid) == len(own)
        self.tenants[tenant] = Tenant()

    @rule(is_crash=st.booleans())
    def restart(self, is_crash: bool) -> None:
        if is_crash:
            ticket = self.tier.begin(self._owner("red", "c1"), {1: bytes(32)}, num_parts=2)
            write_part(ticket, 0, part(*SHAPES[0]))
        self.tier.close()
        self.tier = self._opened()

    @invariant()
    def every_byte_is_counted(self) -> None:
        if not hasattr(self, "tier"):
            return
        sealed = [one for one, _ in self.kept.values()]
        assert sorted(one.spill for one in self.tier.listed()) == sorted(s.spill for s in sealed)
        for tenant in self.tenants:
            own = sum(one.num_bytes for one in sealed if one.owner.tenant == tenant)
            assert self.tier.used_bytes(TenantId(tenant)) == own
        files = (self.folder / "spill").rglob("*")
        on_disk = sum(file.stat().st_size for file in files if file.is_file())
        assert on_disk == sum(one.num_bytes for one in sealed)


TestSpillMachine = SpillMachine.TestCase
TestSpillMachine.settings = settings(
    max_examples=25,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

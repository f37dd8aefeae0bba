"""A sequence's cache that N ranks sealed and M restore is read as if nothing happened."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcluster.attention.part import CacheRules
from kvcluster.cache.saved import HeldEntries, read_held
from kvcluster.cache.spill import SpillOwner, SpillTier
from kvcluster.cache.spill_disk import SpillDisk
from kvcluster.cache.spill_host import SpillHost
from kvcluster.cache.spill_parts import read_parts, restore, write_part
from kvcluster.errors import SavedCacheMismatch
from kvcluster.types import TenantId
from tests.distributed.test_saved_cache import BLOCK_SIZE, assert_equal, group, served

OWNER = SpillOwner(tenant=TenantId("red"), tenant_uid="u", context="c")
KEYS = {1: bytes(range(32))}
NUM_TOKENS = 150


def on_disk(folder: Path) -> SpillTier:
    return SpillDisk(folder / "spill", folder / "index")


def on_host(folder: Path) -> SpillTier:
    return SpillHost(folder)


@pytest.mark.parametrize("opened", [on_disk, on_host])
@pytest.mark.parametrize("codec", ["exact", "int8", "int4", "rotated3"])
@pytest.mark.parametrize("num_ranks", [(1, 1), (3, 2), (2, 4)])
def test_it_decodes_on_as_before_on_any_number_of_ranks(
    codec: str, num_ranks: tuple[int, int], opened: Callable[[Path], SpillTier], tmp_path: Path
) -> None:
    rules = CacheRules(codec, exact_blocks=1)
    saving = served(rules, num_ranks[0], NUM_TOKENS)
    tier = opened(tmp_path)
    ticket = tier.begin(OWNER, KEYS, num_parts=num_ranks[0])
    receipts = [
        write_part(
            ticket,
            rank,
            read_held(
                store, saving.table, rank=rank, form=saving.form, num_tokens=saving.num_tokens
            ),
            {entry: f"key {entry}".encode() for entry in range(NUM_TOKENS // BLOCK_SIZE)},
        )
        for rank, store in enumerate(saving.stores)
    ]
    sealed = tier.commit(ticket, receipts, KEYS)

    saved = read_parts(tier.open(OWNER, sealed.spill, KEYS))
    assert_equal(saved, saving.save())
    loading = group(rules, num_ranks[1], seed=1)
    loading.load(saved)  # which makes its table; what it wrote is spoilt
    for store in loading.stores:
        for layer in range(len(store.spec.layers)):
            for plane in store.planes(layer):
                plane.fill_(float("nan"))
    ticket = tier.open(OWNER, sealed.spill, KEYS)
    for rank, store in enumerate(loading.stores):
        restore(store, loading.table, rank=rank, form=loading.form, ticket=ticket)

    for _ in range(4):
        expected, found = saving.run(1), loading.run(1)
        for ours_THD, theirs_THD in zip(found, expected, strict=True):
            # Sums of float32 numbers near 1 over at most 160 keys, in another order.
            torch.testing.assert_close(ours_THD, theirs_THD, rtol=0, atol=2e-5)
    tier.close()


def test_a_cache_of_another_form_is_not_restored(tmp_path: Path) -> None:
    saving = served(CacheRules("int4", exact_blocks=1), 1, NUM_TOKENS)
    tier = SpillDisk(tmp_path / "spill", tmp_path / "index")
    ticket = tier.begin(OWNER, KEYS, num_parts=1)
    sealed = tier.commit(ticket, [write_part(ticket, 0, saving.save())], KEYS)
    readable = tier.open(OWNER, sealed.spill, KEYS)
    tier.close()
    other = served(CacheRules("int8", exact_blocks=1), 1, NUM_TOKENS)

    with pytest.raises(SavedCacheMismatch, match="another codec: int4, here int8"):
        restore(other.stores[0], other.table, rank=0, form=other.form, ticket=readable)


def test_a_rank_restores_with_no_more_than_its_own_entries(tmp_path: Path) -> None:
    rules = CacheRules("int4", exact_blocks=1)
    saving = served(rules, 3, NUM_TOKENS)
    tier = SpillDisk(tmp_path / "spill", tmp_path / "index")
    ticket = tier.begin(OWNER, KEYS, num_parts=3)
    for_rank = [
        read_held(store, saving.table, rank=rank, form=saving.form, num_tokens=saving.num_tokens)
        for rank, store in enumerate(saving.stores)
    ]
    receipts = [write_part(ticket, rank, saved) for rank, saved in enumerate(for_rank)]
    sealed = tier.commit(ticket, receipts, KEYS)
    readable = tier.open(OWNER, sealed.spill, KEYS)
    tier.close()

    for saved in for_rank:
        assert_equal(read_parts(readable, saved.header.groups), saved)
    nothing = read_parts(readable, [HeldEntries((), ())] * len(saving.form.windows))
    assert all(len(x) == 0 for x in nothing.tensors.values())

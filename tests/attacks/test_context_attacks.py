"""Attacks on stored contexts."""

from pathlib import Path

import pytest

from kvcluster.audit import contexts, wire
from kvcluster.audit.attack import Verdict
from kvcluster.types import TenantId
from tests.attacks.attacked import outcome_of


async def test_our_server_holds_or_has_no_contexts(tmp_path: Path) -> None:
    outcome = await outcome_of(contexts.foreign_contexts, tmp_path)

    is_known = any(service.name == "ContextService" for service in wire.services())
    assert outcome.verdict is (Verdict.HELD if is_known else Verdict.SKIPPED), outcome


async def test_an_engine_that_finds_contexts_by_their_ids_alone_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pytest.importorskip("kvcluster.engine.contexts", reason="no contexts yet")
    find = engine.Contexts.find

    def lax(self: object, tenant: TenantId, context_id: str) -> object:
        own = {key[1]: found for key, found in self._contexts.items()}  # type: ignore[attr-defined]
        return own[context_id] if context_id in own else find(self, tenant, context_id)

    monkeypatch.setattr(engine.Contexts, "find", lax)

    outcome = await outcome_of(contexts.foreign_contexts, tmp_path)

    assert outcome.verdict is Verdict.BREACH, outcome

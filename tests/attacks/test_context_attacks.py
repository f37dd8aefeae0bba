"""Attacks on stored contexts."""

from pathlib import Path

from kvcluster.audit import contexts, wire
from kvcluster.audit.attack import Verdict
from tests.attacks.attacked import outcome_of


async def test_our_server_holds_or_has_no_contexts(tmp_path: Path) -> None:
    outcome = await outcome_of(contexts.foreign_contexts, tmp_path)

    is_known = any(service.name == "ContextService" for service in wire.services())
    assert outcome.verdict is (Verdict.HELD if is_known else Verdict.SKIPPED), outcome

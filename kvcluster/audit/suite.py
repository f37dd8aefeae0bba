"""All attacks against one server, one after the other, and the report of it."""

import time
from collections.abc import Callable, Sequence

import msgspec
from grpc import aio

from kvcluster.audit import channels, collisions, contexts, exhaustion, identity, reach
from kvcluster.audit.attack import Attack, Outcome, Verdict, breached, inconclusive
from kvcluster.audit.scene import Scene, Target, staged
from kvcluster.errors import InvalidField, KvClusterError

ATTACKS: tuple[Attack, ...] = (
    *identity.ATTACKS,
    *reach.ATTACKS,
    *contexts.ATTACKS,
    *exhaustion.ATTACKS,
    *collisions.ATTACKS,
    *channels.ATTACKS,
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One attack in the report."""

    attack: str
    tries: str
    breach: str
    """What would be one."""
    outcome: Outcome
    took_s: float


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `kvcluster audit --json` prints."""

    server: str
    admin_server: str
    is_held: bool
    """No attack was a breach. Those that say `inconclusive` prove nothing either way."""
    findings: tuple[Finding, ...]

    def count(self, verdict: Verdict) -> int:
        return sum(finding.outcome.verdict is verdict for finding in self.findings)


def chosen(names: Sequence[str]) -> tuple[Attack, ...]:
    """The attacks of these names, in their own order; none named: all. Raises: InvalidField."""
    known = {attack.name for attack in ATTACKS}
    unknown = sorted(set(names) - known)
    if unknown:
        raise InvalidField("--attack", f"there is no {unknown[0]!r}; there are {sorted(known)}")
    return tuple(attack for attack in ATTACKS if not names or attack.name in names)


async def run_audit(
    target: Target, attacks: Sequence[Attack], on_finding: Callable[[Finding], None]
) -> AuditReport:
    """Run them all. `on_finding` gets each as it comes. Raises: KvClusterError when the audit
    cannot be set up: no server, or no operator's key."""
    findings = []
    async with staged(target) as scene:
        for attack in attacks:
            start = time.perf_counter()
            outcome = await _outcome(attack, scene)
            finding = Finding(
                attack=attack.name,
                tries=attack.tries,
                breach=attack.breach,
                outcome=outcome,
                took_s=time.perf_counter() - start,
            )
            on_finding(finding)
            findings.append(finding)
    return AuditReport(
        server=target.address,
        admin_server=target.admin_address,
        is_held=all(one.outcome.verdict is not Verdict.BREACH for one in findings),
        findings=tuple(findings),
    )


async def _outcome(attack: Attack, scene: Scene) -> Outcome:
    # Of the attack before; its streams count until the server has noticed that they are gone.
    await scene.until_no_stream_is_open(scene.attacker)
    try:
        return await attack.run(scene)
    except KvClusterError as error:
        # The attack's own ordinary calls are to be answered: a server that stops is a breach too.
        return breached(f"the server did not answer an ordinary call: {error.reason}")
    except aio.AioRpcError as error:
        return inconclusive(
            f"a call of the attack ended otherwise than it may: {error.code().name}"
        )

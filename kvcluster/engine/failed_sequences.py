"""What becomes of the engine's state when a sequence has failed on a rank."""

from kvcluster.cache.block_keys import BlockKey
from kvcluster.engine.in_flight import StepsInFlight
from kvcluster.engine.plan import SequenceFailure
from kvcluster.engine.request import Request
from kvcluster.engine.scheduler import Scheduler
from kvcluster.errors import ComputationFailed


def computation_failed(
    request: Request, failure: SequenceFailure, scheduler: Scheduler, in_flight: StepsInFlight
) -> ComputationFailed:
    """Why a running request whose sequence failed has to end, which is the caller's to do: then it
    keeps nothing for others.

    Blocks are kept for others when the step that fills them is planned. So what the request has
    kept, and all that follows it, is dropped, but for what contexts hold, which was computed
    before; and whoever began with it since, of whom nothing is known yet, begins again.
    """
    prefix = request.prefix
    if prefix is not None:
        keys, tenant = prefix.blocks.keys, request.spec.tenant
        cache = scheduler.prefixes.cache(tenant)
        first = cache.first_unheld(keys)
        dropped = scheduler.prefixes.forget(tenant, keys, scheduler.running)
        scheduler.zeroing.add(cache.shared, dropped, lambda: None)
        prefix.writes, request.checkpoint = False, 0
        for other in tuple(scheduler.running):
            if first is not None and other is not request and _may_have_begun_with(first, other):
                assert other.sequence is not None, "it runs"
                in_flight.void(other.sequence)
                scheduler.preempt(other)
    return ComputationFailed(policy=str(request.policy), doing=failure.doing, kind=failure.kind)


def _may_have_begun_with(key: BlockKey, request: Request) -> bool:
    """Whether the request has the block of this name, and no step that read it is done."""
    prefix = request.prefix
    return prefix is not None and not request.num_computed and key in prefix.blocks.keys

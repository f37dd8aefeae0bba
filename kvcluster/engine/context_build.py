"""The request that computes a context: it is scheduled like any other, and never samples."""

from array import array

from kvcluster.engine.api import GenerationRequest
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRequest
from kvcluster.engine.prefix_keys import PrefixKeys
from kvcluster.engine.request import Request
from kvcluster.types import GenerationId


def generation_for(request: ContextRequest) -> GenerationRequest:
    """What computing a context asks for."""
    return GenerationRequest(
        tenant=request.tenant,
        model=request.model,
        max_output_tokens=1,
        policy=request.policy,
        limits=request.limits,
    )


def generation_of(context: Context, model: str = "") -> GenerationRequest:
    """The same of one that is there."""
    return GenerationRequest(
        tenant=context.tenant,
        model=model,
        max_output_tokens=1,
        policy=str(context.policy),
        limits=context.limits,
    )


def build_request(
    context: Context, tokens: "array[int]", generation: GenerationId, arrival: int, model: str
) -> Request:
    """A request that computes what these tokens, and those that follow, lack."""
    build = Request(generation, generation_of(context, model), context.policy, arrival)
    build.builds_context = True
    build.tokens.extend(tokens)
    build.num_prompt_tokens = build.num_context_tokens = len(tokens)
    build.prefix = PrefixKeys(context.keys.copy(), reads=True, writes=True)
    return build

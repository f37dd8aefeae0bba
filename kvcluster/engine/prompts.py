"""Takes prompt tokens into requests, and checks what can be known of a prompt while it comes."""

from kvcluster.engine import admission
from kvcluster.engine.api import GenerationRequest
from kvcluster.engine.forecast import Forecast
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.prefixes import Prefixes
from kvcluster.engine.request import TOKEN_BYTES, Request
from kvcluster.engine.tenants import TenantUses
from kvcluster.errors import InvalidField, PromptCorrupt
from kvcluster.types import Policy


class Prompts:
    """Mutates requests and their tenants' counts; decides nothing of when they run."""

    def __init__(
        self, parts: EngineParts, prefixes: Prefixes, tenants: TenantUses, forecast: Forecast
    ) -> None:
        self._parts = parts
        self._prefixes = prefixes
        self._tenants = tenants
        self._forecast = forecast
        # A client must be able to send more than a block, or prefill could never start.
        window = parts.config.upload_window_chunks * parts.config.prefill_chunk_tokens
        self._upload_window = max(window, 2 * parts.cache.block_size)

    def admit(self, request: Request) -> None:
        """A request that no generation stands for begins: count it to its tenant."""
        self._tenants.admit(request)

    def end(self, request: Request) -> None:
        """It has ended."""
        self._tenants.end(request)

    def append(self, request: Request, packed_ids: bytes) -> None:
        """As `Engine.append_prompt`."""
        if request.is_prompt_complete:
            raise PromptCorrupt(
                f"the prompt of generation {request.generation} is complete already"
            )
        num_new = len(packed_ids) // TOKEN_BYTES
        declared, num_sent = request.spec.input_tokens, _num_sent(request)
        if declared is not None and num_sent + num_new > declared:
            raise InvalidField("input_tokens", f"declared {declared}, but more tokens were sent")
        self.check_length(request.spec, request.policy, request.num_prompt_tokens + num_new)
        self._tenants.take_prompt(request, num_new, retry_after_s=self._forecast.retry_after_s())
        request.append_prompt(packed_ids)

    def room(self, request: Request) -> int:
        """As `Engine.prompt_room`."""
        known = max(request.num_planned, self._prefixes.known_tokens(request))
        return max(0, self._upload_window - (request.num_prompt_tokens - known))

    def finish(self, request: Request) -> None:
        """As `Engine.finish_prompt`."""
        declared, num_sent = request.spec.input_tokens, _num_sent(request)
        if not num_sent:
            raise InvalidField("prompt", "is empty: send at least one token")
        if declared is not None and num_sent != declared:
            raise InvalidField("input_tokens", f"declared {declared}, but {num_sent} were sent")
        request.is_prompt_complete = True

    def check_length(self, spec: GenerationRequest, policy: Policy, num_prompt_tokens: int) -> None:
        """Raises: ContextTooLong, QuotaExceeded for a prompt of (at least) so many tokens, those of
        a context included."""
        admission.check_context(
            spec, self._parts.spec, num_prompt_tokens=num_prompt_tokens, is_complete=False
        )
        admission.check_capacity(
            spec,
            self._parts.spec,
            cache=self._parts.cache,
            partition=self._parts.partitions.of(spec.tenant),
            num_prompt_tokens=num_prompt_tokens,
            policy=policy,
        )


def _num_sent(request: Request) -> int:
    return request.num_prompt_tokens - request.num_context_tokens

"""One request inside the engine: its tokens, how far they are planned, and its state machine.

    WAITING --start--> RUNNING --end--> ENDED
       ^                  |
       +----- preempt ----+

Planning runs ahead of results: a step's tokens count as planned when the step is planned, as
computed when its result is in. A sampled token whose value is still on the ranks is *pending*.
"""

import math
import sys
from array import array
from collections.abc import Iterable
from enum import StrEnum

from kvcluster.cache.block_table import BlockTable
from kvcluster.engine.api import GenerationRequest
from kvcluster.engine.plan import EncodingError, Scoring
from kvcluster.engine.prefix_keys import PrefixKeys
from kvcluster.engine.survivor_table import SurvivorTable
from kvcluster.types import GenerationId, Policy, SequenceId

TOKEN_BYTES = 4


class RequestState(StrEnum):
    WAITING = "waiting"
    """Holds no blocks."""
    RUNNING = "running"
    """Holds blocks and is known to the ranks as `sequence`."""
    ENDED = "ended"


class Request:
    """Mutable record of one request. The scheduler moves it, the engine feeds and ends it."""

    def __init__(
        self, generation: GenerationId, spec: GenerationRequest, policy: Policy, arrival: int
    ) -> None:
        self.generation = generation
        self.spec = spec
        self.policy = policy
        self.arrival = arrival
        self.state = RequestState.WAITING
        self.tokens = array("I")
        """Known tokens: prompt, then output. 4 bytes each; emptied at the end."""
        self.num_prompt_tokens = 0
        """Prompt tokens uploaded so far, those of the context included."""
        self.num_context_tokens = 0
        """Prompt tokens that came from a context and not from the upload."""
        self.checkpoint = 0
        """Where a context's blocks end: what is held there is kept. 0: nowhere."""
        self.builds_context = False
        """It computes whole blocks for a context and never samples."""
        self.prefix: PrefixKeys | None = None
        """What its blocks are called where they may be shared; None: they may not."""
        self.num_cached = 0
        """Positions below this were there when the request first started."""
        self.is_prompt_complete = False
        self.num_output_tokens = 0
        """Output tokens that the client has, or will have, as events."""
        self.sequence: SequenceId | None = None
        """What the ranks call it; another one after each preemption."""
        self.table: BlockTable | None = None
        self.survivors: SurvivorTable | None = None
        """None where the policy keeps no tokens by score."""
        self.num_planned = self.num_computed = 0
        """Positions below the first are in plans made since the last start, those below the second
        in steps whose result is in."""
        self.num_pending = 0
        """Samples in flight."""
        self.num_scored = 1
        """Prompt tokens below this need no log probability, or are in plans that ask for it."""
        self.num_steps_in_flight = 0
        self.has_sampled = False
        """A plan since the last start samples: from there on every step is a decode."""
        self.peak_kv_bytes = self.peak_tokens = 0
        self.squared_error = self.squared_size = 0.0
        """Sums of `EncodingError` over all ranks and steps."""

    def count_errors(self, errors: Iterable[EncodingError]) -> None:
        """Add those that are of this request's sequence."""
        for error in errors:
            if error.sequence == self.sequence:
                self.squared_error += error.squared_error
                self.squared_size += error.squared_size

    @property
    def attention_error(self) -> float:
        """Relative error of attention over the blocks that were encoded; 0 where none was."""
        if not self.squared_size:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_size)

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: who is served first, and (from the other end) who is preempted first."""
        return (-self.spec.priority, self.arrival)

    @property
    def known_length(self) -> int:
        """Prompt tokens as far as is known: declared, or uploaded so far."""
        declared = self.num_context_tokens + (self.spec.input_tokens or 0)
        return max(self.num_prompt_tokens, declared)

    @property
    def is_ended(self) -> bool:
        return self.state is RequestState.ENDED

    @property
    def can_decode(self) -> bool:
        """The next step is one token, whose id the ranks have or will have sampled by then."""
        return (
            self.state is RequestState.RUNNING
            and self.has_sampled
            and self.num_output_tokens + self.num_pending < self.spec.max_output_tokens
        )

    def prefill_end(self, block_size: int) -> int:
        """Positions below this can be prefilled now.

        Whole blocks only while the prompt is being uploaded, and never all of it: the last
        token's row must be computed in a step that samples.
        """
        if self.has_sampled:
            return self.num_planned
        if self.builds_context:
            return len(self.tokens) // block_size * block_size
        if self.is_prompt_complete:
            return len(self.tokens)
        return max(0, len(self.tokens) - 1) // block_size * block_size

    def append_prompt(self, packed_ids: bytes) -> None:
        """Add prompt tokens: little-endian u32."""
        ids = array("I")
        ids.frombytes(packed_ids)
        if sys.byteorder == "big":
            ids.byteswap()
        self.tokens.extend(ids)
        self.num_prompt_tokens += len(ids)

    def packed_ids(self, start: int, end: int) -> bytes:
        """Tokens [start, end) as little-endian u32."""
        ids = self.tokens[start:end]
        if sys.byteorder == "big":
            ids.byteswap()
        return ids.tobytes()

    def append_output(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self.num_output_tokens += 1

    def scoring(self, end: int) -> Scoring | None:
        """The log probabilities that a step up to position `end` has to give; None: none."""
        first = max(self.num_planned + 1, self.num_scored)
        below = min(end + 1, self.num_prompt_tokens)
        if self.spec.sampling.prompt_logprobs is None or first >= below:
            return None
        return Scoring(first, below, self.tokens[end] if end < below else 0)

    @property
    def tables(self) -> tuple[BlockTable, ...]:
        """All that hold blocks of the request."""
        beside = () if self.survivors is None else (self.survivors.table,)
        return beside if self.table is None else (self.table, *beside)

    def hold(self, table: BlockTable, survivors: SurvivorTable | None) -> None:
        """Give the request tables to be filled, before it starts."""
        self.table = table
        self.survivors = survivors

    def let_go(self) -> None:
        """Forget the tables."""
        self.table = None
        self.survivors = None

    def start(self, sequence: SequenceId) -> None:
        self.state = RequestState.RUNNING
        self.sequence = sequence

    def preempt(self) -> None:
        """Forget what is computed; known tokens stay, and those in flight still count."""
        self.state = RequestState.WAITING
        self._detach()
        self.num_planned = 0
        self.num_computed = 0
        self.has_sampled = False

    def end(self) -> None:
        self.state = RequestState.ENDED
        self._detach()
        self.tokens = array("I")

    def _detach(self) -> None:
        self.sequence = None
        self.let_go()

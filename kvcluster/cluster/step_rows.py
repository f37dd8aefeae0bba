"""What one rank knows of a sequence between steps, and of its rows in one."""

from dataclasses import dataclass

from kvcluster.attention.part import CacheRules, SequencePart
from kvcluster.attention.selected_part import SelectedPart, Selecting
from kvcluster.attention.survivors import SequenceSurvivors, SurvivorPart
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.shard import SequenceMap
from kvcluster.engine.plan import SequenceStep
from kvcluster.model.sampler import SequenceSampling
from kvcluster.retention.offered import recent_blocks
from kvcluster.selection.registry import build_selection
from kvcluster.types import EXACT, Policy


@dataclass(frozen=True)
class Rows:
    """This rank's rows of one sequence in a step."""

    state: "SequenceState"
    step: SequenceStep
    part: SequencePart
    survivors: SurvivorPart | None
    selected: SelectedPart | None

    @property
    def is_compressed(self) -> bool:
        """Whether something is done with its cache that other policies do not do."""
        beside = self.survivors is not None or self.selected is not None
        return beside or self.part.codec != EXACT

    @property
    def is_single(self) -> bool:
        """Whether it is one row that reads its sequence's table, all of it or what it chooses, and
        does no more than sample."""
        is_alone = self.survivors is None and self.step.scoring is None
        return is_alone and not self.part.has_chunk

    @property
    def fills_known_block(self) -> bool:
        """Whether it ends a block whose keys are to be known."""
        return self.selected is not None and len(self.selected.filled_blocks) > 0

    @property
    def is_greedy(self) -> bool:
        """Whether the row's likeliest token is all that is asked of the step."""
        return self.is_single and self.step.samples and self.state.sampling.is_plain_greedy

    @property
    def sampling_rank(self) -> int | None:
        """The rank with the last row, if that row's logits are asked for."""
        return self.part.pieces[-1].rank if self.step.samples else None


class SequenceState:
    """What every rank remembers of a sequence between steps."""

    def __init__(
        self,
        table: SequenceMap,
        survivors: SequenceSurvivors | None,
        sampling: SequenceSampling,
        policy: Policy,
        *,
        exact: ExactRegion,
    ) -> None:
        self.table = table
        self.survivors = survivors
        self.rules = CacheRules(
            policy.storage,
            exact.recent_blocks,
            recent_blocks(policy.retention, table.block_size),
            None if survivors is None else survivors.method.epoch_tokens,
            exact.step_blocks,
        )
        selection = build_selection(policy.selection, table.block_size)
        self.selecting = (
            None if selection is None else Selecting(selection, self.rules.recent_blocks)
        )
        self.sampling = sampling
        self.last_token: int | None = None
        self.has_failed = False
        """It has no rows in any later step."""

"""Steps of decode on one rank: recorded once for each number of rows, then run as CUDA graphs.

The host of a GPU takes longer to ask for the hundreds of small kernels of such a step than the GPU
to run them. A recording asks for all of them at once.

Shape letters: T tokens, R rows, H query heads, D head dimension, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvcluster.attention.decode_selected import SelectedInputs
from kvcluster.attention.decode_step import DecodeAttention, DecodeInputs, DecodeShape
from kvcluster.attention.encoding import ENCODING
from kvcluster.attention.failures import RAISED, Raised
from kvcluster.attention.kernel_attention import KernelAttention
from kvcluster.attention.part import SequencePart
from kvcluster.attention.selected_part import SelectedPart
from kvcluster.cache.store import KVStore
from kvcluster.model.ahead_row import AheadRow
from kvcluster.model.attention_hook import LayerAttention
from kvcluster.model.compiled_layers import CompiledLayers
from kvcluster.model.encode_graphs import EncodeGraphs
from kvcluster.model.loader import LoadedModel
from kvcluster.model.recorded import Recording, record
from kvcluster.model.row_layers import row_layers
from kvcluster.model.sampled_ahead import SampledAhead
from kvcluster.model.sampler import likeliest_tokens

ROW_COUNTS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)
"""Rows of recordings. A step has some of its rows twice to have as many."""
_MAX_RECORDINGS: Final = 64
"""Requests choose their codecs, so there is no end of combinations."""


class DecodeOutcome(NamedTuple):
    """What a step gave. A recording's is overwritten by its next run."""

    logits_RV: Tensor
    """Float32, of all rows."""
    likeliest_R: Tensor
    """Of each row, int64: see `likeliest_tokens`."""
    queries: dict[int, Tensor]
    """q_RHD by layer."""


class DecodeGraphs:
    """A model's steps over one rank's cache. Mutates the cache: the rows are written."""

    def __init__(self, model: LoadedModel, store: KVStore, kernels: KernelAttention) -> None:
        """Raises: ValueError where kernels do not read rows of the store."""
        if kernels.rows is None:
            raise ValueError("rows of this cache are not read by kernels")
        self._model = model
        self._store = store
        self._rows = kernels.rows
        self._inputs = DecodeInputs(store, max_rows=ROW_COUNTS[-1])
        self._selected: SelectedInputs | None = None
        self._ahead = SampledAhead(ROW_COUNTS[-1], model.device)
        self._recordings: dict[DecodeShape, Recording[DecodeOutcome]] = {}
        self._can_record = model.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._can_record else None
        self._encode = EncodeGraphs(store, kernels, self._pool)
        self._row_layers = row_layers(model)
        self._layers: CompiledLayers | None = None
        if self._can_record:
            self._layers = CompiledLayers(model.module)
            self._layers.warm_up(model.spec, model.device)
        self._logit_rows_R = torch.arange(ROW_COUNTS[-1], device=model.device)

    def serves(self, parts: Sequence[SequencePart], selected: Sequence[SelectedPart] = ()) -> bool:
        """Whether these parts, each of one row and all on this rank, are a step of this kind.
        `selected`: those that choose what they read; all parts are, or none."""
        is_served = self._rows.serves_all_layers
        if len(parts) > ROW_COUNTS[-1] or not all(is_served(part) for part in parts):
            return False
        if not selected:
            return True
        return len(selected) == len(parts) and self._selecting().serves(selected)

    def _selecting(self) -> SelectedInputs:
        if self._selected is None:
            self._selected = SelectedInputs(self._store, self._rows, max_rows=ROW_COUNTS[-1])
        return self._selected

    @torch.inference_mode()
    def forward(
        self,
        parts: Sequence[SequencePart],
        token_ids: Sequence[int | AheadRow],
        selected: Sequence[SelectedPart] = (),
    ) -> DecodeOutcome:
        """Run the rows of the parts, one token each: one that the host knows, or one that is on the
        device since `send_tokens`. `selected`: as `serves` was told."""
        num_rows = next(count for count in ROW_COUNTS if count >= len(parts))
        # Rows that are there twice write the same twice: the shortest, which reads the least.
        shortest = min(range(len(parts)), key=lambda row: parts[row].start)
        rows = [*range(len(parts)), *[shortest] * (num_rows - len(parts))]
        tokens = [token_ids[row] for row in rows]
        known = [0 if isinstance(token, AheadRow) else token for token in tokens]
        shape = self._inputs.set_rows([parts[row] for row in rows], known)
        if selected:
            chosen = self._selecting().set_rows([selected[row] for row in rows])
            shape = shape._replace(selected=chosen)
        self._take_tokens(tokens)
        if self._can_record and shape not in self._recordings:
            self._record(shape)
        recording = self._recordings.get(shape)
        outcome = self._run(shape) if recording is None else recording.run()
        return outcome._replace(
            logits_RV=outcome.logits_RV[: len(parts)],
            likeliest_R=outcome.likeliest_R[: len(parts)],
        )

    def encodes(self, part: SequencePart) -> bool:
        """Whether `encode` does what the part's row makes encoded."""
        return self._encode.serves(part)

    @torch.inference_mode()
    def encode(
        self,
        parts: Mapping[int, SequencePart],
        outcome: DecodeOutcome,
        failures: Raised = RAISED,
    ) -> Callable[[], dict[SequencePart, tuple[float, float]]]:
        """Encode what the rows of a step fill, parts by row, after `forward`. What is returned
        waits for what `BlockEncoding.errors` gives."""
        sums = {}
        for row, part in parts.items():
            with failures.contain(part, ENCODING):
                sums[part] = self._encode.run(part, outcome.queries, row)
        return lambda: {part: wait() for part, wait in sums.items()}

    def send_tokens(self, outcome: DecodeOutcome) -> Callable[[], list[int]]:
        """Keep the likeliest tokens of a step for the next one: see `SampledAhead.send`."""
        return self._ahead.send(outcome.likeliest_R)

    def _take_tokens(self, tokens: Sequence[int | AheadRow]) -> None:
        """Put tokens of the step before among those that the host has set."""
        token_ids_R = self._inputs.token_ids(len(tokens))
        places = [token.row if isinstance(token, AheadRow) else None for token in tokens]
        if places == list(range(len(tokens))):
            token_ids_R.copy_(self._ahead.tokens_R[: len(tokens)])
            return
        for row, place in enumerate(places):
            if place is not None:
                token_ids_R[row].copy_(self._ahead.tokens_R[place])

    def _run(self, shape: DecodeShape) -> DecodeOutcome:
        attention = DecodeAttention(self._store, self._rows, self._inputs, shape, self._selected)
        token_ids_R = self._inputs.token_ids(shape.num_rows)
        positions_R = self._inputs.positions(shape.num_rows)
        if self._row_layers is not None and shape.num_rows == 1:
            logits_RV = self._row_layers.forward(token_ids_R, positions_R, attention)
        else:
            rows_R = self._logit_rows_R[: shape.num_rows]
            logits_RV = self.compiled(token_ids_R, positions_R, rows_R, attention)
        return DecodeOutcome(logits_RV, likeliest_tokens(logits_RV), attention.queries)

    def compiled(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        logit_rows_R: Tensor,
        attention: LayerAttention,
    ) -> Tensor:
        """`LoadedModel.forward` of any step, through compiled layers where there are such."""
        with self._layers.in_place() if self._layers is not None else nullcontext():
            return self._model.forward(token_ids_T, positions_T, logit_rows_R, attention)

    def _record(self, shape: DecodeShape) -> None:
        """Not for a model that waits for the GPU in the middle of a step: its steps are run as they
        are."""
        recording = record(lambda: self._run(shape), self._pool)
        self._can_record = recording is not None
        if recording is not None:
            while len(self._recordings) >= _MAX_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
            self._recordings[shape] = recording

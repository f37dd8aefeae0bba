"""What a student is told about a text: how far its predictions are from the exact model's.

The exact model reads the text once, without a gradient. Its keys and values are restored as the
student's codec would, the model reads the text again, far blocks so restored and near ones its own
(`restored_attention.py`), and the divergence of the two predictions is the loss.

Shape letters: T tokens, R rows with predictions, V vocabulary, K KV heads, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvcluster.codec.refined import Array
from kvcluster.model.attention_hook import differentiable_forward
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibrating import CalibrationText
from kvcluster.quality.restored_attention import RestoredAttention
from kvcluster.quality.strict import ExactTokens, KeysValues, LayerCodecs, StrictAttention
from kvcluster.quality.student import Student

_MAX_LOGITS: Final = 1 << 25
"""That are compared at one time: 128 MiB of float32, some ten times over."""
_MAX_LOGITS_ON_GPU: Final = 1 << 27


@dataclass(frozen=True, slots=True, eq=False)
class _Taught:
    """A text as the exact model reads it."""

    token_ids_T: Tensor
    rows_R: Tensor
    weights_R: Tensor
    """How much each row counts; 1 on average."""
    logits_RV: Tensor
    written: dict[int, KeysValues]


class Lesson:
    """Compares a student with the exact model, text by text."""

    def __init__(
        self,
        model: LoadedModel,
        student: Student,
        exact: ExactTokens,
        *,
        answer_weight: float,
        seed: int,
    ) -> None:
        """`answer_weight`: of a token of a needle's answer; others count 1. `seed`: of which rows
        are looked at, where a text has more than there is room for."""
        self._model = model
        self._student = student
        self._exact = exact
        self._answer_weight = answer_weight
        self._choice = torch.Generator().manual_seed(seed)

    def loss(self, text: CalibrationText) -> Tensor:
        """Weighted mean divergence over some rows of a text, with a gradient."""
        taught = self._teach(text, self._rows(text, self._choice))
        return (self._divergences(taught) * taught.weights_R).mean()

    def divergence(self, texts: Sequence[CalibrationText]) -> float:
        """Mean over texts of the mean over their rows, all alike."""
        total = 0.0
        with torch.no_grad():
            for text in texts:
                taught = self._teach(text, self._rows(text, torch.Generator().manual_seed(0)))
                total += float(self._divergences(taught).mean())
        return total / len(texts)

    def gradients(self, text: CalibrationText) -> dict[tuple[range, Array], Tensor]:
        """By what is restored, of the negative log-likelihood of tokens that are drawn from the
        exact predictions."""
        taught = self._teach(text, self._rows(text, self._choice))
        encoded = self._student.encoded_rows(len(text.token_ids))
        leaves = {
            layer: KeysValues(*(x_KTD[:, encoded].clone().requires_grad_() for x_KTD in arrays))
            for layer, arrays in taught.written.items()
        }
        attention = RestoredAttention(self._model.spec, leaves, self._exact)
        logits_RV = self._forward(taught.token_ids_T, taught.rows_R, attention)
        chances_RV = logits_RV.detach().softmax(dim=-1).cumsum(dim=-1)
        uniform_R1 = torch.rand(len(chances_RV), 1, generator=self._choice).to(chances_RV.device)
        drawn_R = torch.searchsorted(chances_RV, uniform_R1 * chances_RV[:, -1:])[:, 0]
        loss = torch.nn.functional.cross_entropy(logits_RV, drawn_R, reduction="none")
        arrays = [x_KTD for leaf in leaves.values() for x_KTD in leaf]
        found = torch.autograd.grad((loss * taught.weights_R).sum(), arrays)
        pairs = zip(found[::2], found[1::2], strict=True)
        by_layer = {layer: KeysValues(*pair) for layer, pair in zip(leaves, pairs, strict=True)}
        return self._student.gradients(by_layer, len(text.token_ids))

    def _divergences(self, taught: _Taught) -> Tensor:
        """Of each row, [R]."""
        attention = RestoredAttention(
            self._model.spec, self._student.restored(taught.written), self._exact
        )
        logits_RV = self._forward(taught.token_ids_T, taught.rows_R, attention)
        exact_RV = taught.logits_RV.log_softmax(dim=-1)
        return (exact_RV.exp() * (exact_RV - logits_RV.log_softmax(dim=-1))).sum(dim=-1)

    def _teach(self, text: CalibrationText, rows_R: Tensor) -> _Taught:
        spec, device = self._model.spec, self._model.device
        written: dict[int, KeysValues] = {}

        def observe(layer: int, _q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
            if spec.kv_layer_of(layer) == layer:
                written[layer] = KeysValues(
                    k_TKD.transpose(0, 1).clone(), v_TKD.transpose(0, 1).clone()
                )

        token_ids_T = torch.tensor(text.token_ids, dtype=torch.int64, device=device)
        attention = StrictAttention(
            spec, lambda _layer: LayerCodecs(None, None), self._exact, observe
        )
        with torch.no_grad():
            logits_RV = self._forward(token_ids_T, rows_R.to(device), attention)
        is_answer_R = torch.isin(rows_R + 1, torch.tensor(text.answers, dtype=torch.int64))
        weights_R = 1 + (self._answer_weight - 1) * is_answer_R.float()
        return _Taught(
            token_ids_T,
            rows_R.to(device),
            (weights_R / weights_R.mean()).to(device),
            logits_RV,
            written,
        )

    def _rows(self, text: CalibrationText, choice: torch.Generator) -> Tensor:
        """Ascending rows that predict a token and read something encoded: all of them, or as many
        as there is room for, those of answers first."""
        num_tokens = len(text.token_ids)
        encoded = self._student.encoded_rows(num_tokens)
        first = encoded.start + (1 + self._exact.lag) * self._exact.block_size
        rows = torch.arange(min(first, num_tokens - 2), num_tokens - 1)
        most = _MAX_LOGITS if self._model.device.type == "cpu" else _MAX_LOGITS_ON_GPU
        room = max(1, most // self._model.spec.vocab_size)
        order = torch.rand(len(rows), generator=choice)
        order[torch.isin(rows + 1, torch.tensor(text.answers, dtype=torch.int64))] = -1.0
        return rows[order.argsort()[:room]].sort().values

    def _forward(
        self,
        token_ids_T: Tensor,
        rows_R: Tensor,
        attention: RestoredAttention | StrictAttention,
    ) -> Tensor:
        positions_T = torch.arange(len(token_ids_T), device=token_ids_T.device)
        return differentiable_forward(
            self._model.module, token_ids_T, positions_T, rows_R, attention
        )

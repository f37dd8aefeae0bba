"""Scores are those of the plain log softmax, whatever the tiles."""

import torch

from kvcluster.model.scorer import score


def test_scores_are_log_softmax_at_the_wanted_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_RV = torch.randn(150, 33, generator=generator)
    wanted_R = torch.randint(33, (150,), generator=generator)

    scores = score(logits_RV, wanted_R, num_top=3)

    logprobs_RV = logits_RV.log_softmax(dim=-1)
    best = logprobs_RV.sort(dim=-1, descending=True)
    assert torch.equal(scores.logprobs_R, logprobs_RV[torch.arange(150), wanted_R])
    assert torch.equal(scores.top_ids_RN, best.indices[:, :3])
    assert torch.equal(scores.top_logprobs_RN, best.values[:, :3])


def test_a_small_vocabulary_bounds_how_many_are_likeliest() -> None:
    scores = score(torch.zeros(2, 4), torch.tensor([0, 3]), num_top=20)

    assert scores.top_ids_RN.shape == (2, 4)


def test_no_likeliest_tokens_may_be_asked_for() -> None:
    scores = score(torch.zeros(2, 4), torch.tensor([0, 3]), num_top=0)

    assert scores.logprobs_R.tolist() == [scores.logprobs_R[0]] * 2
    assert scores.top_ids_RN.shape == (2, 0)

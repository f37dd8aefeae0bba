"""Bases are the best of their rank for the error that counts, and a file gives back what was
written or nothing."""

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcluster.codec.basis import Basis
from kvcluster.codec.calibration import (
    Calibration,
    GroupCalibration,
    LayerCalibration,
    adaptive_ranks,
    fit_keys,
    fit_values,
    output_weights,
    rank_for_energy,
    read_calibration,
    write_calibration,
)
from kvcluster.codec.moments import LayerMoments, MomentSums, upper_bound, weighted_sum
from kvcluster.errors import CalibrationMismatch, ConfigError

NUM_KV_HEADS, DIM, WIDTH = 3, 8, 24


def text(seed: int, num_tokens: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that look at other directions than those in which keys vary most."""
    generator = torch.Generator().manual_seed(seed)
    mix_FF = torch.randn(WIDTH, WIDTH, generator=generator) * 0.8 ** torch.arange(WIDTH)
    looks_KDD = torch.randn(NUM_KV_HEADS, 1, DIM, DIM, generator=generator)
    looks_KDD = looks_KDD * 0.4 ** torch.arange(DIM)
    q_TKGD = torch.randn(num_tokens, NUM_KV_HEADS, 2, 1, DIM, generator=generator) @ looks_KDD
    k_TF, v_TF = (torch.randn(num_tokens, WIDTH, generator=generator) @ mix_FF.T for _ in "kv")
    shape = (num_tokens, NUM_KV_HEADS, DIM)
    return q_TKGD.reshape(num_tokens, 6, DIM), k_TF.reshape(shape) + 5, v_TF.reshape(shape) - 2


def moments_of(one: tuple[Tensor, Tensor, Tensor]) -> LayerMoments:
    sums = MomentSums(NUM_KV_HEADS, DIM, DIM)
    sums.add(*one)
    return sums.moments()


MOMENTS = moments_of(text(0))


def unweighted(moments: LayerMoments) -> LayerMoments:
    same = torch.eye(DIM, dtype=torch.float64).expand(NUM_KV_HEADS, DIM, DIM)
    return dataclasses.replace(moments, query_KDD=same)


def restored(basis: Basis, x_TF: Tensor) -> Tensor:
    return basis.mean_F + (x_TF - basis.mean_F) @ basis.down_FC @ basis.up_CF


def logit_error(basis: Basis, one: tuple[Tensor, Tensor, Tensor]) -> float:
    """Mean over queries and keys of the squared error of a logit, summed over query heads."""
    q_THD, k_TKD, _ = one
    k_TF = k_TKD.flatten(1)
    off_TKD = (restored(basis, k_TF) - k_TF).reshape(k_TKD.shape)
    logits = torch.einsum("thd,shd->hts", q_THD[:500], off_TKD[:500].repeat_interleave(2, dim=1))
    return float((logits**2).sum(0).mean())


def test_a_basis_of_full_rank_gives_keys_back() -> None:
    k_TF = text(0)[1].flatten(1)

    basis = fit_keys(MOMENTS, rank=WIDTH)

    # Float32 numbers through two matrices whose condition, here near 1e3, multiplies rounding.
    assert (restored(basis, k_TF) - k_TF).norm() < 1e-4 * k_TF.norm()


def test_the_mean_costs_no_rank() -> None:
    """Keys that lie in 2 directions around a mean far from 0 are exact at rank 2."""
    generator = torch.Generator().manual_seed(0)
    k_TF = torch.randn(200, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    k_TKD = k_TF.reshape(200, NUM_KV_HEADS, DIM) + 100
    moments = moments_of((torch.randn(200, 6, DIM, generator=generator), k_TKD, k_TKD))

    basis = fit_keys(moments, rank=2)

    off = restored(basis, k_TKD.flatten(1)) - k_TKD.flatten(1)
    # Float32 rounds numbers around 100 by 4e-6.
    assert off.abs().max() < 1e-4


@pytest.mark.parametrize("rank", [1, 5, 12, 23])
def test_a_prefix_of_a_basis_is_the_basis_of_that_rank(rank: int) -> None:
    prefix = fit_keys(MOMENTS, rank=WIDTH).prefix(rank)
    fitted = fit_keys(MOMENTS, rank=rank)

    assert torch.equal(prefix.down_FC, fitted.down_FC)
    assert torch.equal(prefix.up_CF, fitted.up_CF)


@pytest.mark.parametrize("rank", [3, 6, 12])
def test_weighing_by_queries_beats_plain_directions_in_the_logits(rank: int) -> None:
    weighted = logit_error(fit_keys(MOMENTS, rank=rank), text(0))
    plain = logit_error(fit_keys(unweighted(MOMENTS), rank=rank), text(0))

    assert weighted < 0.9 * plain


def test_no_projection_of_the_rank_has_less_weighted_error() -> None:
    """The optimum is a minimum: moving the basis in any direction costs."""
    basis = fit_keys(MOMENTS, rank=6)
    best = logit_error(basis, text(0))
    generator = torch.Generator().manual_seed(1)

    for _ in range(5):
        moved_CF = basis.up_CF + 0.05 * torch.randn(6, WIDTH, generator=generator)
        moved_FC = torch.linalg.pinv(moved_CF)
        moved = dataclasses.replace(basis, down_FC=moved_FC, up_CF=moved_CF)
        assert logit_error(moved, text(0)) > best


def test_the_spectrum_beyond_the_rank_is_the_error_in_the_logits() -> None:
    basis = fit_keys(MOMENTS, rank=6)
    _, k_TKD, _ = text(0)
    off_TKD = restored(basis, k_TKD.flatten(1)) - k_TKD.flatten(1)
    off_KTD = off_TKD.reshape(k_TKD.shape).transpose(0, 1).double()

    error = (MOMENTS.query_KDD @ (off_KTD.transpose(1, 2) @ off_KTD)).diagonal(dim1=1, dim2=2)

    # The ridge weighs every direction by 1e-4 of the mean weight more than the queries do.
    assert float(error.sum()) / len(k_TKD) == pytest.approx(
        float(basis.spectrum_F[6:].sum()), rel=0.02
    )


def test_latents_of_the_calibration_text_have_unit_variance() -> None:
    basis = fit_keys(MOMENTS, rank=12)

    latent_TC = (text(0)[1].flatten(1) - basis.mean_F) @ basis.down_FC

    torch.testing.assert_close(latent_TC.var(0), torch.ones(12), atol=1e-2, rtol=0)


def test_the_scale_of_logits_scales_the_spectrum_alone() -> None:
    plain, scaled = fit_keys(MOMENTS, rank=6), fit_keys(MOMENTS, rank=6, scale=0.5)

    torch.testing.assert_close(scaled.spectrum_F, plain.spectrum_F / 4)
    torch.testing.assert_close(
        scaled.down_FC @ scaled.up_CF, plain.down_FC @ plain.up_CF, atol=1e-5, rtol=1e-4
    )


def test_weighing_values_by_the_output_projection_beats_plain_directions_after_it() -> None:
    generator = torch.Generator().manual_seed(2)
    output_EHD = torch.randn(16, 6, DIM, generator=generator) * 0.4 ** torch.arange(DIM)
    v_TF = text(0)[2].flatten(1)

    def output_error(basis: Basis) -> float:
        off_THD = (restored(basis, v_TF) - v_TF).reshape(-1, NUM_KV_HEADS, DIM)
        return float(
            torch.einsum("ehd,thd->teh", output_EHD, off_THD.repeat_interleave(2, dim=1))
            .square()
            .sum()
        )

    weighted = fit_values(MOMENTS, rank=8, output_KDD=output_weights(output_EHD, NUM_KV_HEADS))

    assert output_error(weighted) < 0.9 * output_error(fit_values(MOMENTS, rank=8))


def test_plain_values_have_the_spectrum_of_their_covariance() -> None:
    basis = fit_values(MOMENTS, rank=4)

    expected_F = torch.linalg.eigvalsh(MOMENTS.values.covariance_FF).flip(0)
    # The ridge adds 1e-4 to every weight of 1.
    torch.testing.assert_close(basis.spectrum_F, expected_F, atol=0, rtol=2e-4)


def test_a_rare_direction_survives_an_upper_bound_and_not_a_sum() -> None:
    """Keys of one short text vary where those of a long one never do."""
    q_THD, _, _ = text(0)
    generator = torch.Generator().manual_seed(3)
    common_TF, rare_TF = torch.zeros(2, 2000, WIDTH)
    common_TF[:, :4] = torch.randn(2000, 4, generator=generator)
    rare_TF[:, 20] = torch.randn(2000, generator=generator)
    sources = [
        unweighted(moments_of((q_THD, x.reshape(-1, NUM_KV_HEADS, DIM), x.reshape(-1, 3, DIM))))
        for x in (common_TF, rare_TF)
    ]

    def kept(moments: LayerMoments) -> float:
        """Share of the rare direction that the best 4 directions keep."""
        basis = fit_keys(moments, rank=4)
        return float((basis.down_FC @ basis.up_CF)[20, 20])

    assert kept(weighted_sum(sources, [20.0, 1.0])) < 0.01
    # As large as each common direction, of which it may replace one in part.
    assert kept(upper_bound(sources, [20.0, 1.0])) > 0.5


def test_too_short_a_text_is_refused() -> None:
    short = moments_of(tuple(x[:95] for x in text(0)))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="at least 96 tokens"):
        fit_keys(short, rank=4)


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: want 1 to 24, got {rank}"):
        fit_keys(MOMENTS, rank=rank)


def test_keys_that_never_vary_are_given_back() -> None:
    still = torch.full((200, NUM_KV_HEADS, DIM), 3.0)
    moments = moments_of((torch.zeros(200, 6, DIM), still, still))

    basis = fit_keys(moments, rank=4)

    assert torch.equal(restored(basis, still.flatten(1)), still.flatten(1))


def test_equal_moments_give_equal_bases() -> None:
    first, second = (fit_keys(moments_of(text(0)), rank=8) for _ in range(2))

    assert torch.equal(first.down_FC, second.down_FC)


STEEP, FLAT = 0.5 ** torch.arange(24.0), 0.98 ** torch.arange(24.0)


@pytest.mark.parametrize("mean_rank", [4, 8, 13, 24])
def test_adaptive_ranks_meet_the_mean_in_multiples(mean_rank: int) -> None:
    ranks = adaptive_ranks([STEEP, FLAT, STEEP * 4], mean_rank=mean_rank, multiple=4)

    assert all(rank % 4 == 0 and 4 <= rank <= 24 for rank in ranks)
    assert 0 <= mean_rank * 3 - sum(ranks) < 4


def test_a_layer_with_a_flat_spectrum_gets_a_higher_rank() -> None:
    steep, flat = adaptive_ranks([STEEP, FLAT], mean_rank=12)

    assert steep < flat


def test_adaptive_ranks_are_one_threshold_over_all_layers() -> None:
    spectra = [STEEP * 3, FLAT, STEEP * 200]

    ranks = adaptive_ranks(spectra, mean_rank=12)

    gains = [s.reshape(-1, 4).sum(1) for s in spectra]
    least_taken = min(float(g[: r // 4].min()) for g, r in zip(gains, ranks, strict=True) if r > 4)
    most_left = max(float(g[r // 4 :].max()) for g, r in zip(gains, ranks, strict=True) if r < 24)
    assert most_left <= least_taken


@pytest.mark.parametrize("mean_rank", [0, 3, 25])
def test_a_mean_rank_that_no_layers_can_have_is_refused(mean_rank: int) -> None:
    with pytest.raises(ValueError, match="mean rank: want 4 to 24"):
        adaptive_ranks([STEEP, FLAT], mean_rank=mean_rank)


def test_the_rank_for_a_share_of_the_energy_is_the_lowest() -> None:
    spectrum_F = torch.tensor([6.0, 3.0, 1.0])

    assert [rank_for_energy(spectrum_F, share) for share in (0.5, 0.6, 0.7, 1.0)] == [1, 1, 2, 3]


CALIBRATION = Calibration(
    weights_digest="model",
    text_digests=("prose", "code"),
    num_tokens=2000,
    layers=tuple(
        LayerCalibration(
            keys=fit_keys(moments, rank=12),
            values=fit_values(moments, rank=16),
        )
        for moments in (MOMENTS, moments_of(text(1)))
    ),
    groups=(
        GroupCalibration(
            range(2), keys=fit_keys(MOMENTS, rank=20), values=fit_values(MOMENTS, rank=8)
        ),
    ),
    recipes_json='[{"policy": "int4"}]',
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.calibration"
    write_calibration(path, CALIBRATION)
    return path


def test_a_file_gives_back_what_was_written(file: Path) -> None:
    found = read_calibration(file, "model")

    for name in ("weights_digest", "text_digests", "num_tokens", "recipes_json"):
        assert getattr(found, name) == getattr(CALIBRATION, name)
    assert len(found.layers) == 2
    assert [group.layers for group in found.groups] == [range(2)]
    bases = zip(
        (*found.layers, *found.groups), (*CALIBRATION.layers, *CALIBRATION.groups), strict=True
    )
    for layer, written in bases:
        for basis, expected in ((layer.keys, written.keys), (layer.values, written.values)):
            for part in dataclasses.fields(Basis):
                assert torch.equal(getattr(basis, part.name), getattr(expected, part.name))


def test_equal_calibrations_are_equal_files(file: Path, tmp_path: Path) -> None:
    write_calibration(tmp_path / "again", CALIBRATION)

    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_writing_leaves_nothing_else_behind(file: Path) -> None:
    write_calibration(file, CALIBRATION)

    assert list(file.parent.iterdir()) == [file]


def test_a_file_of_another_model_is_refused(file: Path) -> None:
    with pytest.raises(CalibrationMismatch, match="made for another model"):
        read_calibration(file, "other")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 3000, -1])
def test_a_truncated_file_is_refused(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])

    with pytest.raises(CalibrationMismatch, match="truncated or no calibration file"):
        read_calibration(file, "model")


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CalibrationMismatch, match="cannot be read"):
        read_calibration(tmp_path / name, "model")


@pytest.mark.parametrize("share", [0.4, 0.6, 0.99])
def test_one_flipped_bit_is_found(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)

    with pytest.raises(CalibrationMismatch, match="was changed"):
        read_calibration(file, "model")


def with_metadata(file: Path, metadata: dict[str, str] | None) -> None:
    """Replace the metadata of a safetensors file: 8 bytes of length, JSON header, tensors."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def metadata_of(file: Path) -> dict[str, str | int]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    record = json.loads(content[8 : 8 + length])["__metadata__"]["kvcluster.calibration"]
    metadata: dict[str, str | int] = json.loads(record)
    return metadata


@pytest.mark.parametrize("name", ["weights_digest", "recipes_json", "digest"])
def test_an_edited_record_is_found(file: Path, name: str) -> None:
    edited = json.dumps(metadata_of(file) | {name: "mine"})
    with_metadata(file, {"kvcluster.calibration": edited})

    with pytest.raises(CalibrationMismatch, match="was changed"):
        read_calibration(file, "mine")


def test_an_unknown_version_is_named(file: Path) -> None:
    edited = json.dumps({"format_version": 7, "something": "else"})
    with_metadata(file, {"kvcluster.calibration": edited})

    with pytest.raises(CalibrationMismatch, match="has format version 7"):
        read_calibration(file, "model")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"kvcluster.calibration": "{"},
        {"kvcluster.calibration": "[]"},
        {"kvcluster.calibration": '{"format_version": 1}'},
    ],
)
def test_a_safetensors_file_without_our_record_is_refused(
    file: Path, metadata: dict[str, str] | None
) -> None:
    with_metadata(file, metadata)

    with pytest.raises(CalibrationMismatch, match="no calibration file"):
        read_calibration(file, "model")

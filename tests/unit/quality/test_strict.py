"""Attention over a compressed cache is what its definition says, query by query."""

import math

import pytest
import torch
from torch import Tensor

from kvcluster.attention.local import attend_plain, visible
from kvcluster.attention.partial import merge_sinks
from kvcluster.codec.array import ArrayCodec
from kvcluster.quality import strict
from kvcluster.quality.strict import ExactTokens, LayerCodecs, StrictAttention
from kvcluster.types import LayerGeometry
from tests.unit.quality.toys import Coarse, Same, Undeclared, spec_of

# Some hundred float32 roundings of numbers near 1, summed in another order.
ATOL = 2e-5


def geometry(window: int | None = None, softcap: float | None = None) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=4,
        num_kv_heads=2,
        key_dim=8,
        value_dim=8,
        scale=0.4,
        window=window,
        softcap=softcap,
    )


def random_qkv(layer: LayerGeometry, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)

    def random(num_heads: int, dim: int) -> Tensor:
        return 2 * torch.randn(num_tokens, num_heads, dim, generator=generator)

    return (
        random(layer.num_query_heads, layer.key_dim),
        random(layer.num_kv_heads, layer.key_dim),
        random(layer.num_kv_heads, layer.value_dim),
    )


def run(
    layer: LayerGeometry,
    qkv: tuple[Tensor, Tensor, Tensor],
    codecs: LayerCodecs | None,
    exact: ExactTokens,
    sinks_H: Tensor | None = None,
) -> Tensor:
    attention = StrictAttention(spec_of(layer), lambda _layer: codecs, exact)
    return attention.attend(0, *qkv, sinks_H)


def causal(layer: LayerGeometry, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    q_THD, k_TKD, v_TKD = qkv
    positions_T = torch.arange(len(q_THD))
    mask_TS = visible(positions_T, positions_T, layer.window)
    return attend_plain(q_THD, k_TKD.transpose(0, 1), v_TKD.transpose(0, 1), layer, mask_TS).out_THD


def token_by_token(
    layer: LayerGeometry,
    qkv: tuple[Tensor, Tensor, Tensor],
    codecs: LayerCodecs,
    exact: ExactTokens,
) -> Tensor:
    """The definition as a loop over queries and keys."""
    q_THD, k_TKD, v_TKD = qkv
    size, group = exact.block_size, layer.num_query_heads // layer.num_kv_heads
    out_THD = torch.zeros(len(q_THD), layer.num_query_heads, layer.value_dim)

    def as_read(x_TKD: Tensor, codec: ArrayCodec | None, query: int, key: int) -> Tensor:
        block = key // size
        is_exact = block >= query // size - exact.lag or (exact.exact_sinks and block == 0)
        if is_exact or codec is None:
            return x_TKD[key]
        rows_BKSD = x_TKD[block * size : (block + 1) * size].transpose(0, 1)[None]
        positions_BS = torch.arange(block * size, (block + 1) * size)[None]
        return codec.decode(codec.encode(rows_BKSD, positions_BS), positions_BS)[0, :, key % size]

    for query in range(len(q_THD)):
        first = 0 if layer.window is None else max(0, query - layer.window + 1)
        keys = range(first, query + 1)
        k_SKD = torch.stack([as_read(k_TKD, codecs.keys, query, key) for key in keys])
        v_SKD = torch.stack([as_read(v_TKD, codecs.values, query, key) for key in keys])
        for head in range(layer.num_query_heads):
            logits_S = k_SKD[:, head // group] @ q_THD[query, head] * layer.scale
            if layer.softcap is not None:
                logits_S = layer.softcap * torch.tanh(logits_S / layer.softcap)
            out_THD[query, head] = torch.softmax(logits_S, dim=0) @ v_SKD[:, head // group]
    return out_THD


@pytest.mark.parametrize("codecs", [None, LayerCodecs(Same(), Same())])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("num_tokens", [1, 16, 61])
def test_a_cache_that_loses_nothing_gives_causal_attention(
    num_tokens: int,
    window: int | None,
    codecs: LayerCodecs | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strict, "_TILE_TOKENS", 16)
    layer = geometry(window)
    qkv = random_qkv(layer, num_tokens)

    out_THD = run(layer, qkv, codecs, ExactTokens(block_size=4))

    torch.testing.assert_close(out_THD, causal(layer, qkv), rtol=0, atol=ATOL)


@pytest.mark.parametrize("exact_sinks", [True, False])
@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("window", [None, 3, 10, 30])
@pytest.mark.parametrize(("num_tokens", "block_size"), [(3, 4), (24, 4), (37, 4), (37, 16)])
def test_a_lossy_cache_gives_the_loop_over_queries_and_keys(
    num_tokens: int,
    block_size: int,
    window: int | None,
    lag: int,
    exact_sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several tiles, each of more than one block.
    monkeypatch.setattr(strict, "_TILE_TOKENS", 8)
    layer = geometry(window)
    qkv = random_qkv(layer, num_tokens)
    codecs = LayerCodecs(Coarse(), Coarse())
    exact = ExactTokens(block_size=block_size, lag=lag, exact_sinks=exact_sinks)

    out_THD = run(layer, qkv, codecs, exact)

    expected = token_by_token(layer, qkv, codecs, exact)
    torch.testing.assert_close(out_THD, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("codecs", [LayerCodecs(Coarse(), None), LayerCodecs(None, Coarse())])
def test_keys_and_values_may_be_compressed_alone(codecs: LayerCodecs) -> None:
    layer = geometry(softcap=3.0)
    qkv = random_qkv(layer, 30)
    exact = ExactTokens(block_size=4)

    out_THD = run(layer, qkv, codecs, exact)

    expected = token_by_token(layer, qkv, codecs, exact)
    torch.testing.assert_close(out_THD, expected, rtol=0, atol=ATOL)


def test_the_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = geometry()
    qkv = random_qkv(layer, 50)
    codecs, exact = LayerCodecs(Coarse(), Coarse()), ExactTokens(block_size=4)
    whole_THD = run(layer, qkv, codecs, exact)

    monkeypatch.setattr(strict, "_TILE_TOKENS", 1)
    monkeypatch.setattr(strict, "_ENCODED_ELEMENTS", 1)

    torch.testing.assert_close(run(layer, qkv, codecs, exact), whole_THD, rtol=0, atol=ATOL)


def test_learned_sinks_count_once() -> None:
    layer = geometry()
    q_THD, k_TKD, v_TKD = random_qkv(layer, 30)
    sinks_H = torch.tensor([0.5, -1.0, 2.0, 0.0])

    out_THD = run(
        layer,
        (q_THD, k_TKD, v_TKD),
        LayerCodecs(Same(), Same()),
        ExactTokens(block_size=4),
        sinks_H,
    )

    positions_T = torch.arange(30)
    partial = attend_plain(
        q_THD,
        k_TKD.transpose(0, 1),
        v_TKD.transpose(0, 1),
        layer,
        visible(positions_T, positions_T, None),
    )
    expected = merge_sinks(partial, sinks_H).out_THD
    torch.testing.assert_close(out_THD, expected, rtol=0, atol=ATOL)


def test_bfloat16_tensors_give_bfloat16_within_its_rounding() -> None:
    layer = geometry()
    qkv = tuple(x.bfloat16() for x in random_qkv(layer, 40))
    codecs, exact = LayerCodecs(Coarse(), Coarse()), ExactTokens(block_size=4)

    out_THD = run(layer, (qkv[0], qkv[1], qkv[2]), codecs, exact)

    whole = (qkv[0].float(), qkv[1].float(), qkv[2].float())
    expected = token_by_token(layer, whole, codecs, exact)
    assert out_THD.dtype == torch.bfloat16
    # One rounding of the result, to 8 bits.
    torch.testing.assert_close(out_THD.float(), expected, rtol=2**-8, atol=ATOL)


def test_stored_bytes_are_those_of_the_planes_and_of_the_exact_tokens() -> None:
    layer = geometry()
    attention = StrictAttention(
        spec_of(layer), lambda _layer: LayerCodecs(Coarse(), Coarse()), ExactTokens(block_size=4)
    )

    attention.attend(0, *random_qkv(layer, 22), None)

    stored = attention.stored()
    # Blocks 1 to 4 are encoded; block 0 and the two tokens of block 5 are not. int8 is one byte.
    per_token = 2 * (8 + 8)
    assert stored.encoded_bytes == 16 * per_token
    assert stored.total_bytes == 16 * per_token + 6 * per_token * 2
    assert stored.bytes_per_token == pytest.approx(stored.total_bytes / 22)
    assert stored.ratio == pytest.approx(22 * per_token * 2 / stored.total_bytes)
    assert stored.payload_ratio == 2
    assert stored.payload_bits_per_element == 8


def test_a_window_counts_only_the_blocks_that_the_last_token_sees() -> None:
    layer = geometry(window=6)
    attention = StrictAttention(
        spec_of(layer), lambda _layer: LayerCodecs(Coarse(), Coarse()), ExactTokens(block_size=4)
    )

    attention.attend(0, *random_qkv(layer, 22), None)

    # The last token sees positions 16 to 21: block 4, which is encoded, and two tokens of block 5.
    stored = attention.stored()
    assert stored.encoded_elements == 4 * 2 * (8 + 8)
    assert stored.exact_elements == 2 * 2 * (8 + 8)


def test_an_exact_cache_has_ratio_one() -> None:
    layer = geometry()
    attention = StrictAttention(spec_of(layer), lambda _layer: None, ExactTokens(block_size=4))

    attention.attend(0, *random_qkv(layer, 22), None)

    assert attention.stored().ratio == 1
    assert attention.stored().payload_ratio == 1
    assert attention.stored().bits_per_element == 16


def test_an_observer_sees_what_the_layer_got() -> None:
    layer = geometry()
    qkv = random_qkv(layer, 9)
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
    attention = StrictAttention(
        spec_of(layer),
        lambda _layer: LayerCodecs(Coarse(), Coarse()),
        ExactTokens(block_size=4),
        lambda *args: seen.append(args),
    )

    attention.attend(0, *qkv, None)

    [(number, *tensors)] = seen
    assert number == 0
    assert all(a is b for a, b in zip(tensors, qkv, strict=True))


def test_planes_other_than_the_declared_ones_are_refused() -> None:
    layer = geometry()

    with pytest.raises(ValueError, match="declares planes"):
        run(
            layer,
            random_qkv(layer, 12),
            LayerCodecs(Undeclared(), None),
            ExactTokens(block_size=4),
        )


@pytest.mark.parametrize(("block_size", "lag"), [(0, 0), (4, -1)])
def test_impossible_exact_tokens_are_refused(block_size: int, lag: int) -> None:
    with pytest.raises(ValueError, match="want block_size"):
        ExactTokens(block_size=block_size, lag=lag)


def test_a_far_block_is_read_as_the_codec_restores_it() -> None:
    """Zero queries weigh all keys alike, so the output is the mean of the values as read."""
    layer = geometry()
    q_THD, k_TKD, v_TKD = random_qkv(layer, 8)

    out_THD = run(
        layer,
        (torch.zeros_like(q_THD), k_TKD, v_TKD),
        LayerCodecs(None, Coarse()),
        ExactTokens(block_size=4, exact_sinks=False),
    )

    shift_T11 = 0.01 * torch.arange(4)[:, None, None]
    far_KD = ((v_TKD[:4] + shift_T11).round() - shift_T11).sum(dim=0)
    expected_KD = (far_KD + v_TKD[4:].sum(dim=0)) / 8
    torch.testing.assert_close(out_THD[7, ::2], expected_KD, rtol=0, atol=ATOL)
    assert math.isclose(float(out_THD[0, 0, 0]), float(v_TKD[0, 0, 0]), abs_tol=ATOL)

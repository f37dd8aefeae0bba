"""A sequence's cache, saved and loaded on any number of ranks, is read as if nothing happened."""

from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kvcluster.attention.part import CacheRules
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.saved import SavedCache, read_file, write_file, write_held
from kvcluster.codec.registry import STORAGE_MENU
from kvcluster.errors import SavedCacheMismatch
from kvcluster.policy import parse_policy
from kvcluster.types import EXACT
from tests.attention_group import AttentionGroup
from tests.codec_models import (
    EVERY_STORAGE,
    JOINED,
    PLAIN,
    Served,
    calibrated_codecs,
    plain_codecs,
)
from tests.scripted_model import ScriptedModel, geometry, latent_geometry

BLOCK_SIZE = 16
MODEL = ScriptedModel(geometry(), geometry(window=24), geometry(window=100), max_tokens=240)
ORDINARY = Served(MODEL, calibrated_codecs(MODEL.spec))
STACKED_MODEL = ScriptedModel(
    geometry(), geometry(), geometry(window=24), geometry(window=24), max_tokens=240
)
STACKED = Served(STACKED_MODEL, calibrated_codecs(STACKED_MODEL.spec))
"""Layers that can share a latent."""
LATENT_MODEL = ScriptedModel(latent_geometry(), latent_geometry(window=24), max_tokens=240)
VALUES_IN_KEYS = Served(LATENT_MODEL, plain_codecs(LATENT_MODEL.spec))
STORED = [(storage, ORDINARY) for storage in EVERY_STORAGE] + [
    (codec, VALUES_IN_KEYS) for codec in (EXACT, *PLAIN)
]
RULES = CacheRules("int4", exact_blocks=1)


def group(
    rules: CacheRules, num_ranks: int, seed: int = 0, subject: Served = ORDINARY
) -> AttentionGroup:
    return AttentionGroup(*subject, rules, num_ranks=num_ranks, block_size=BLOCK_SIZE, seed=seed)


def served(
    rules: CacheRules, num_ranks: int, num_tokens: int, subject: Served = ORDINARY
) -> AttentionGroup:
    """A group with a prompt computed in two chunks, or as many as its steps ask for."""
    serving = group(rules, num_ranks, subject=subject)
    most = num_tokens // 2 // BLOCK_SIZE * BLOCK_SIZE or num_tokens
    region = ExactRegion(rules.exact_blocks, rules.encoded_step)
    while serving.num_tokens < num_tokens:
        start = serving.num_tokens
        end = num_tokens if start == most else min(start + most, num_tokens)
        serving.run(region.chunk_end(start, end, BLOCK_SIZE) - start)
    return serving


def assert_equal(one: SavedCache, other: SavedCache) -> None:
    assert msgspec.structs.replace(one.header, digest="") == msgspec.structs.replace(
        other.header, digest=""
    )
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        as_bytes = [x.contiguous().view(torch.uint8) for x in (tensor, other.tensors[name])]
        assert torch.equal(*as_bytes), name


def check(
    tmp_path: Path,
    rules: CacheRules,
    num_ranks: tuple[int, int],
    num_tokens: int,
    subject: Served = ORDINARY,
) -> None:
    """Decode 18 tokens: on the ranks that computed the prompt, and on others that loaded it."""
    storage = parse_policy(rules.codec, STORAGE_MENU).storage
    step = subject.codecs.encoded_step(storage, rules.exact_blocks)
    rules = rules._replace(codec=storage, encoded_step=step)
    saving = served(rules, num_ranks[0], num_tokens, subject)
    write_file(tmp_path / "saved", saving.save())
    saved = read_file(tmp_path / "saved", saving.form)
    loading = group(rules, num_ranks[1], seed=1, subject=subject)
    loading.load(saved, places_of=saving if num_ranks[0] == num_ranks[1] else None)

    assert_equal(loading.save(), saved)
    for _ in range(18):
        expected, found = saving.run(1), loading.run(1)
        for ours_THD, saved_THD in zip(found, expected, strict=True):
            if num_ranks[0] == num_ranks[1]:
                assert torch.equal(ours_THD, saved_THD)
            # Sums of float32 numbers near 1 over at most 240 keys, in another order.
            torch.testing.assert_close(ours_THD, saved_THD, rtol=0, atol=2e-5)


@pytest.mark.parametrize("storage", EVERY_STORAGE)
@pytest.mark.parametrize("num_ranks", [(1, 1), (3, 3), (3, 2)])
def test_every_codec_decodes_on_as_before(
    tmp_path: Path, storage: str, num_ranks: tuple[int, int]
) -> None:
    check(tmp_path, CacheRules(storage, exact_blocks=1), num_ranks, num_tokens=150)


@pytest.mark.parametrize("codec", [EXACT, "int4", "rotated3"])
def test_latents_of_the_model_s_own_decode_on_as_before(tmp_path: Path, codec: str) -> None:
    rules = CacheRules(codec, exact_blocks=1)

    check(tmp_path, rules, (3, 2), num_tokens=150, subject=VALUES_IN_KEYS)


@pytest.mark.parametrize("codec", JOINED)
@pytest.mark.parametrize("num_ranks", [(1, 1), (3, 2)])
@pytest.mark.parametrize("exact_blocks", [0, 2])
def test_every_latent_of_several_layers_decodes_on_as_before(
    tmp_path: Path, codec: str, num_ranks: tuple[int, int], exact_blocks: int
) -> None:
    check(tmp_path, CacheRules(codec, exact_blocks), num_ranks, num_tokens=150, subject=STACKED)


def test_a_latent_of_several_layers_is_saved_once() -> None:
    rules = CacheRules("latent:r=0.5,bits=8,keys=int4,layers=2", exact_blocks=1, encoded_step=1)
    saved = served(rules, 2, 150, STACKED).save()

    planes = [
        len([name for name in saved.tensors if name.startswith(f"{place}.encoded.")])
        for place in ("0.0", "0.1", "1.2", "1.3")
    ]
    # Codes, scales and zero-points: of keys, and of the values of two layers.
    assert planes == [6, 3, 6, 3]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    stored=st.sampled_from(STORED),
    exact_blocks=st.integers(0, 3),
    recent_blocks=st.sampled_from([None, None, 2, 4]),
    num_ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_tokens=st.integers(1, 200),
)
def test_a_save_and_a_load_change_nothing(
    tmp_path: Path,
    stored: tuple[str, Served],
    exact_blocks: int,
    recent_blocks: int | None,
    num_ranks: tuple[int, int],
    num_tokens: int,
) -> None:
    storage, subject = stored
    rules = CacheRules(storage, exact_blocks, recent_blocks)
    check(tmp_path, rules, num_ranks, num_tokens, subject)


def test_equal_sequences_are_equal_files_whatever_ranks_saved_them(tmp_path: Path) -> None:
    """K and V do not depend on ranks here; their blocks' bytes then do not either."""
    for num_ranks in (1, 3):
        write_file(tmp_path / str(num_ranks), served(RULES, num_ranks, 150).save())

    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


def test_what_the_sequence_has_not_written_is_not_saved() -> None:
    """Slots beyond the last token may hold what others wrote; here they are NaN."""
    saved = served(CacheRules(), 2, 150).save()

    assert all(tensor.isfinite().all() for tensor in saved.tensors.values())
    assert len(saved.tensors["0.0.exact.keys"]) == 150


def test_released_blocks_are_not_saved() -> None:
    saved = served(CacheRules("int4", exact_blocks=0, recent_blocks=2), 2, 150).save()
    _, windowed, _ = saved.header.groups

    # The second chunk began in block 4, and read from block 3 on.
    assert saved.header.groups[0].exact == (0, 9)
    assert saved.header.groups[0].encoded == (3, 4, 5, 6, 7, 8)
    assert (*windowed.encoded, *windowed.exact) == (2, 3, 4, 5, 6, 7, 8, 9)


@pytest.fixture
def saved_int4(tmp_path: Path) -> Path:
    write_file(tmp_path / "saved", served(RULES, 2, 100).save())
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_digest": "other"}, "another model"),
        ({"dtype": "bfloat16"}, "another dtype: float32, here bfloat16"),
        ({"codec": "int8"}, "another codec: int4, here int8"),
        ({"block_size": 32}, "another block size: 16, here 32"),
        ({"windows": (None,)}, "another set of attention windows"),
        ({"calibration_digest": "other"}, "another calibration"),
        ({"exact_blocks": 2}, "another number of blocks that are read exact: 1, here 2"),
    ],
)
def test_a_cache_of_another_form_is_refused(
    saved_int4: Path, change: dict[str, object], message: str
) -> None:
    form = msgspec.structs.replace(group(RULES, 1).form, **change)

    with pytest.raises(SavedCacheMismatch, match=message):
        read_file(saved_int4, form)


def test_latents_know_their_calibration() -> None:
    fitted = group(CacheRules("latent:r=0.5"), 1).form
    other_model = ScriptedModel(geometry(), geometry(window=24), max_tokens=1)
    other = AttentionGroup(
        other_model,
        calibrated_codecs(other_model.spec),
        CacheRules("latent:r=0.5"),
        num_ranks=1,
        block_size=BLOCK_SIZE,
    )

    assert fitted.calibration_digest != ""
    assert fitted.calibration_digest != other.form.calibration_digest
    assert group(CacheRules("int4"), 1).form.calibration_digest == ""


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved_int4: Path, kept: int) -> None:
    saved_int4.write_bytes(saved_int4.read_bytes()[:kept])

    with pytest.raises(SavedCacheMismatch, match="truncated or no saved cache"):
        read_file(saved_int4, group(RULES, 1).form)


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_one_flipped_bit_is_found(saved_int4: Path, share: float) -> None:
    content = bytearray(saved_int4.read_bytes())
    content[int(share * len(content))] ^= 1
    saved_int4.write_bytes(content)

    with pytest.raises(SavedCacheMismatch, match="was changed"):
        read_file(saved_int4, group(RULES, 1).form)


def test_an_edited_record_is_found(saved_int4: Path) -> None:
    with safe_open(saved_int4, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edited = {key: text.replace('"int4"', '"int8"') for key, text in metadata.items()}
    save_file(tensors, saved_int4, edited)

    with pytest.raises(SavedCacheMismatch, match="was changed"):
        read_file(saved_int4, group(CacheRules("int8", exact_blocks=1), 1).form)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("0.0.exact.keys", lambda x: x[:-1], "has 35 rows, not 36"),
        ("0.0.exact.keys", lambda x: x.double(), "rows .* of torch.float64, not"),
        ("0.0.encoded.0", lambda x: x[..., :-1], r"rows \(2, 16, 7\) of torch.uint8, not"),
        ("0.0.encoded.0", None, "lacks entry 1"),
    ],
)
def test_arrays_that_do_not_fit_the_store_are_refused(
    name: str, change: object, message: str
) -> None:
    saved = served(RULES, 1, 100).save()
    tensors = dict(saved.tensors)
    changed = tensors.pop(name)
    if callable(change):
        tensors[name] = change(changed)
    loading = served(RULES, 1, 100)

    with pytest.raises(SavedCacheMismatch, match=message):
        write_held(
            loading.stores[0], loading.table, rank=0, saved=SavedCache(saved.header, tensors)
        )

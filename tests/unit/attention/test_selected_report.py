"""What doctor says of chosen blocks follows from what kernels take."""

import pytest

pytest.importorskip("triton")

from kvcluster.attention.chosen_reasons import reason_against
from kvcluster.attention.selected_report import chosen_lines
from kvcluster.selection.registry import METHODS
from kvcluster.types import LayerGeometry


def layer(dim: int, **others: int | bool) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=4,
        num_kv_heads=int(others.get("num_kv_heads", 2)),
        key_dim=dim,
        value_dim=dim,
        values_in_keys=bool(others.get("values_in_keys", False)),
        scale=1.0,
    )


@pytest.mark.parametrize(
    ("geometry", "asked", "words"),
    [
        (layer(64), {"block_size": 8}, "want a power of two"),
        (layer(64), {"block_size": 48}, "want a power of two"),
        (layer(64), {"block_size": 64, "num_blocks": (1 << 16) + 1}, "more than a program"),
        (layer(320), {"block_size": 64, "has_tiles": True}, "heads of 320"),
        (layer(320), {"block_size": 64, "has_rows": True}, "heads of 320"),
        (layer(64), {"block_size": 64, "has_rows": True, "unread_codec": "x"}, "decode reads x"),
    ],
)
def test_what_kernels_do_not_serve_has_a_reason(
    geometry: LayerGeometry, asked: dict[str, int], words: str
) -> None:
    reason = reason_against(geometry, **asked)

    assert reason is not None
    assert words in reason


def test_what_kernels_serve_has_none() -> None:
    absorbed = layer(576, num_kv_heads=1, values_in_keys=True)

    assert reason_against(absorbed, block_size=64, num_blocks=9, has_rows=True) is None
    assert reason_against(layer(64), block_size=64, has_tiles=True, unread_codec="x") is None


def test_every_method_is_named_and_every_reason() -> None:
    lines = chosen_lines()

    assert all(name in lines["chosen blocks, decode"] for name in METHODS)
    assert "quest" not in lines["chosen blocks, prefill"]
    for words in ("heads of 576", "no kernel of decode reads", "power of two", "kept by score"):
        assert words in lines["chosen blocks in torch"]

"""What doctor says of decode follows from what kernels take."""

import pytest

pytest.importorskip("triton")

from kvcluster.attention.decode_report import decode_lines


def test_plain_codecs_are_told_apart_from_mixtures_that_no_kernel_reads() -> None:
    lines = decode_lines()

    for codec in ("fp8", "int8", "int4", "int3", "int2", "rotated4", "rotated3", "rotated2"):
        assert codec in lines["decode"]
        assert f", {codec}," not in f"{lines['decode in torch']},"
    assert "fp8 values beside latents" in lines["decode in torch"]


def test_every_width_of_latents_is_listed_with_the_values_beside_them() -> None:
    line = decode_lines()["decode of latents"]

    assert "16 bits, 8 bits, 4 bits, 3 bits, 2 bits, 4 rotated bits" in line
    assert "rotated3" in line.partition("beside")[2]


def test_what_the_kernel_for_hopper_reads_of_latents_is_told() -> None:
    line = decode_lines()["decode of latents on Hopper"]

    assert "latents of 4 bits beside int8, int4, int3, rotated4, rotated3, rotated2," in line
    assert "64 divides" in line

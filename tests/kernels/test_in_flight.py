"""The check of registers of products under way, on code whose faults are known."""

import pytest

from tests.kernels.in_flight import early_touches, instructions

_LOGITS = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"
_VALUES = "HGMMA.64x16x16.F32.BF16 R40, R8, gdesc[UR8].tnspB, R40, gsb0"
_WAIT_FOR_FIRST = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
_WAIT_FOR_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def touches(*lines: str) -> list[str]:
    """Of lines at addresses 0000, 0010, and so on, after which a program ends."""
    listing = "".join(
        f"        /*{16 * place:04x}*/        {line} ;  /* 0x0 */\n"
        for place, line in enumerate((*lines, "EXIT"))
    )
    return early_touches(instructions(listing))


@pytest.mark.parametrize(
    ("line", "is_early"),
    [
        ("FADD R24, R24, R25", False),
        ("FADD R9, R2, R3", True),
        ("FADD R2, R9, R3", False),
        ("FADD R40, R2, R3", True),
        ("FADD R2, R47, R3", True),
        ("FADD R2, R48, R3", False),
        ("@!P0 LDS.128 R4, [R2+0x10]", False),
        ("LDS.128 R8, [R2+0x10]", True),
        ("LDGSTS.E.BYPASS.128 [R39+0x80], desc[UR18][R38.64]", False),
        ("LDGSTS.E.BYPASS.128 [R2+0x80], desc[UR18][R39.64]", True),
        ("STS.128 [R2], R36", False),
        ("STS.128 [R2], R37", True),
        ("UIADD3 UR8, UR9, UR40, URZ", False),
    ],
)
def test_between_the_waits_the_second_product_has_its_registers(line: str, is_early: bool) -> None:
    found = touches(_LOGITS, _VALUES, _WAIT_FOR_FIRST, line, _WAIT_FOR_ALL, line)

    assert found == ([f"30: {line.removeprefix('@!P0 ')}"] if is_early else [])


def test_a_product_may_add_to_what_another_one_adds_to() -> None:
    assert touches(_VALUES, _VALUES, _WAIT_FOR_ALL) == []


def test_a_product_must_not_write_what_another_one_reads() -> None:
    onto_weights = _LOGITS.replace("R24", "R8")

    assert len(touches(_VALUES, onto_weights, _WAIT_FOR_ALL)) == 1


def test_what_runs_on_into_the_next_turn_of_a_loop_is_found() -> None:
    weights = "F2FP.BF16.F32.PACK_AB R8, R2, R3"

    found = touches(weights, _VALUES, "@P0 BRA 0x0", _WAIT_FOR_ALL)

    assert found == [f"0: {weights}"]


def test_products_without_a_mark_belong_to_the_group_of_the_next_one_with_it() -> None:
    unmarked = _VALUES.removesuffix(", gsb0")

    # One group, which the wait for all but the latest one leaves under way.
    assert len(touches(unmarked, _VALUES, _WAIT_FOR_FIRST, "FADD R9, R2, R3", _WAIT_FOR_ALL)) == 1

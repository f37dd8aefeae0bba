"""Finds machine code that touches registers of matrix products that are still under way.

A Hopper matrix unit reads weights from registers, and adds to others, long after the instruction
that asked for it. Until the wait for it, nothing else may write the former or touch the latter;
nothing in the processor sees to that. The assembler does, unless a kernel carries such values into
the next turn of a loop: then it may reuse their registers, and results are wrong by chance.

`WARPGROUP.DEPBAR.LE gsb0, N` waits for all groups of products but the N latest ones; the last
product of a group has `gsb0`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.M)
_PRODUCT = re.compile(r"\.64x(\d+)x\d+\.\S+ R(\d+), (?:R(\d+)|gdesc)")
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
_ADDRESS = re.compile(r"\[[^]]*\]")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_NO_RESULT = ("ST", "RED", "BAR", "SYNCS", "BRA", "EXIT", "R2UR", "WARP", "NOP", "U")
"""What these begin with writes no register of a thread."""
_MAX_GROUPS = 4
"""More under way are followed as if the oldest were one; kernels wait for all but fewer."""
_WIDE = {".64": 2, ".128": 4, ".WIDE": 2}


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    is_conditional: bool
    opcode: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:x}: {self.opcode}{self.operands.rstrip()}"


class Group(NamedTuple):
    """Products that are waited for together."""

    sums: frozenset[int] = frozenset()
    """Registers that they add to."""
    weights: frozenset[int] = frozenset()
    """Registers that they read."""
    is_whole: bool = False


_State = tuple[Group, ...]
"""Groups under way, the oldest first."""


def instructions(listing: str) -> list[Instruction]:
    """What `cuobjdump -sass` prints, in order."""
    return [
        Instruction(int(match[1], 16), match[2] is not None, match[3], match[4])
        for match in _INSTRUCTION.finditer(listing)
    ]


def early_touches(code: Sequence[Instruction]) -> list[str]:
    """Instructions that may run while a product needs the registers that they touch; on any way
    through the code, possible or not."""
    places = {each.address: index for index, each in enumerate(code)}
    seen: set[tuple[int, _State]] = set()
    # Code behind a jump is also what a table of jumps may lead to.
    open_: list[tuple[int, _State]] = [(0, ())]
    open_ += [(index + 1, ()) for index, each in enumerate(code) if _leaves(each)]
    found = set()
    while open_:
        index, state = open_.pop()
        if index >= len(code) or (index, state) in seen:
            continue
        seen.add((index, state))
        each = code[index]
        if _touches(each, state):
            found.add(each)
        state = _after(each, state)
        if each.opcode == "BRA":
            targets = _TARGET.findall(each.operands)
            open_.append((places[int(targets[-1], 16)], state))
        if not _leaves(each):
            open_.append((index + 1, state))
    return [str(each) for each in sorted(found)]


def _leaves(each: Instruction) -> bool:
    """Whether the next instruction never follows."""
    return each.opcode in ("BRA", "BRX", "EXIT") and not each.is_conditional


def _after(each: Instruction, state: _State) -> _State:
    wait = _WAIT.search(each.operands) if each.opcode == "WARPGROUP.DEPBAR.LE" else None
    if wait:
        return state[max(0, len(state) - int(wait[1], 16)) :]
    product = _product(each)
    if product is None:
        return state
    if state and not state[-1].is_whole:
        return (*state[:-1], _joined(state[-1], product))
    if len(state) == _MAX_GROUPS:
        state = (_joined(*state[:2]), *state[2:])
    return (*state, product)


def _joined(one: Group, other: Group) -> Group:
    return Group(one.sums | other.sums, one.weights | other.weights, other.is_whole)


def _product(each: Instruction) -> Group | None:
    if not each.opcode.startswith("HGMMA"):
        return None
    match = _PRODUCT.search(each.opcode + each.operands)
    assert match is not None, f"a product of an unknown form: {each}"
    width, first, weights = int(match[1]), int(match[2]), match[3]
    return Group(
        frozenset(range(first, first + width // 2)),
        frozenset(range(int(weights), int(weights) + 4) if weights else ()),
        "gsb0" in each.operands,
    )


def _touches(each: Instruction, state: _State) -> bool:
    if not state:
        return False
    product = _product(each)
    if product is not None:
        # Products that add to the same registers wait for each other.
        return any(group.weights & product.sums or group.sums & product.weights for group in state)
    width = next((n for suffix, n in _WIDE.items() if suffix in each.opcode), 1)
    values = [int(match[1]) for match in _REGISTER.finditer(_ADDRESS.sub("", each.operands))]
    read = {number + i for number in values for i in range(width)}
    for address in _ADDRESS.findall(each.operands):
        for match in _REGISTER.finditer(address):
            read |= {int(match[1]), int(match[1]) + (match[2] is not None)}
    is_written = values and not each.opcode.startswith(_NO_RESULT)
    written = set(range(values[0], values[0] + width)) if is_written else set()
    return any(group.sums & read or group.weights & written for group in state)

"""What the inline assembly of packed codes computes, instruction by instruction, on a CPU: Triton's
interpreter runs other code in its place."""

import random
import re
from inspect import getsource
from types import ModuleType

import numpy as np
import pytest
import torch
from kvcluster_kernels import codes, levels, packed_tiles

_ASSEMBLY = re.compile(r'"""\s*(\{ \.reg.*?\})\s*"""', re.DOTALL)
_REGISTER = 0xFFFFFFFF


def permuted(low: int, high: int, selector: int) -> int:
    """PTX `prmt.b32`: bit 3 of a selector asks for the sign of the byte in its place."""
    table = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    picked = [(table[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
    signs = [0xFF * (byte >> 7) if asks else byte for byte, asks in picked]
    return int.from_bytes(bytes(signs), "little")


def looked_up(a: int, b: int, c: int, table: int) -> int:
    """PTX `lop3.b32`: bit by bit, by a table of eight."""
    return sum(
        (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
        for i in range(32)
    )


def halves(register: int) -> np.ndarray:
    """The two float16 numbers of a register."""
    return np.array([register], dtype="<u4").view("<f2")


def register_of(pair: np.ndarray) -> int:
    return int(pair.astype("<f2").view("<u4")[0])


def fused(a: int, b: int, c: int) -> int:
    """PTX `fma.rn.f16x2`; float64 holds products of float16 and sums of them and such numbers."""
    x, y, z = (halves(register).astype(np.float64) for register in (a, b, c))
    return register_of(x * y + z)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "sub.f16x2": lambda a, b: register_of(halves(a) - halves(b)),
    "fma.rn.f16x2": fused,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "prmt.b32": permuted,
    "lop3.b32": looked_up,
}


def run(assembly: str, num_outputs: int, packed: int) -> list[list[float]]:
    """The four float16 numbers of each field of four bytes."""
    registers = {f"${num_outputs}": packed}
    for statement in assembly.strip("{} \n").split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            operation, arguments = statement.split(maxsplit=1)
            target, *given = (argument.strip() for argument in arguments.split(","))
            numbers = [registers[x] if x in registers else int(x, 0) for x in given]
            registers[target] = OPERATIONS[operation](*numbers) & _REGISTER
    words = np.array([registers[f"${i}"] for i in range(num_outputs)], dtype="<u4")
    return words.view("<f2").astype(float).reshape(-1, 4).tolist()


def assembly_of(module: ModuleType, number: int) -> str:
    return _ASSEMBLY.findall(getsource(module))[number]


def fields(packed: int, bits: int) -> list[list[int]]:
    """The codes of four bytes by field, lowest bits first."""
    return [
        [packed >> 8 * byte + shift & 2**bits - 1 for byte in range(4)]
        for shift in range(0, 8, bits)
    ]


@pytest.mark.parametrize(("number", "bits"), [(0, 8), (1, 4), (2, 2)])
def test_codes_become_multiples_of_the_least_float16(number: int, bits: int) -> None:
    assembly = assembly_of(codes, number)
    generator = random.Random(0)

    for packed in (generator.getrandbits(32) for _ in range(200)):
        stored = packed ^ 0x80808080 if bits == 8 else packed
        want = [
            [code * 2.0 ** (field * bits - 24) for code in codes_of_field]
            for field, codes_of_field in enumerate(fields(stored, bits))
        ]
        assert run(assembly, 16 // bits, packed) == want


@pytest.mark.parametrize(("number", "bits"), [(1, 4), (2, 2)])
def test_codes_become_the_levels_of_the_codebook(number: int, bits: int) -> None:
    assembly = assembly_of(levels, number)
    listed = levels.levels(bits).to(torch.float64).tolist()
    generator = random.Random(0)

    for packed in (generator.getrandbits(32) for _ in range(200)):
        want = [[listed[code] for code in each] for each in fields(packed, bits)]
        assert run(assembly, 16 // bits, packed) == want


@pytest.mark.parametrize(("number", "bits"), [(0, 8), (1, 4), (2, 2)])
def test_codes_become_their_numbers(number: int, bits: int) -> None:
    assembly = assembly_of(packed_tiles, number)
    generator = random.Random(0)

    for packed in (generator.getrandbits(32) for _ in range(200)):
        stored = packed ^ 0x80808080 if bits == 8 else packed
        assert run(assembly, 16 // bits, packed) == fields(stored, bits)

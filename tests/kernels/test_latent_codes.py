"""What the inline assembly of latents computes, instruction by instruction, on a CPU: Triton's
interpreter runs other code in its place."""

import random

import numpy as np
import pytest
from kvcluster_kernels import latent_codes, latent_turns

from tests.kernels.test_assembly import OPERATIONS, assembly_of

_REGISTER = 0xFFFFFFFF


def halves(register: int) -> np.ndarray:
    """The two float16 numbers of a register, as float64."""
    return np.array([register], dtype="<u4").view("<f2").astype(np.float64)


def register(numbers: np.ndarray) -> int:
    return int(numbers.astype("<f2").view("<u4")[0])


def fused(a: int, b: int, c: int) -> int:
    """PTX `fma.rn.f16x2`: float64 has room for the product, and for the sum of such numbers."""
    return register(halves(a) * halves(b) + halves(c))


PACKED = {
    **OPERATIONS,
    "mov.b32": lambda a: a,
    "neg.f16x2": lambda a: a ^ 0x80008000,
    "add.f16x2": lambda a, b: register(halves(a) + halves(b)),
    "sub.f16x2": lambda a, b: register(halves(a) - halves(b)),
    "mul.f16x2": lambda a, b: register(halves(a) * halves(b)),
    "fma.rn.f16x2": fused,
}


def run(assembly: str, inputs: dict[str, int], num_outputs: int) -> list[float]:
    """The float16 numbers of the first registers, after it ran."""
    registers = dict(inputs)
    for statement in assembly.strip("{} \n").split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            operation, arguments = statement.split(maxsplit=1)
            target, *given = (argument.strip() for argument in arguments.split(","))
            numbers = [registers[x] if x in registers else int(x, 0) for x in given]
            registers[target] = PACKED[operation](*numbers) & _REGISTER
    outputs = [halves(registers[f"${i}"]) for i in range(num_outputs)]
    return np.concatenate(outputs).tolist()


def drawn(generator: random.Random) -> int:
    """A register of two numbers of order 1."""
    return register(np.array([generator.gauss(0, 1), generator.gauss(0, 1)]))


@pytest.mark.parametrize(("number", "bits"), [(0, 8), (1, 4), (2, 2)])
def test_codes_become_their_numbers_rounded_once(number: int, bits: int) -> None:
    assembly = assembly_of(latent_codes, number)
    generator = random.Random(0)
    fields = 8 // bits

    for packed in (generator.getrandbits(32) for _ in range(100)):
        inputs, want = {f"${2 * fields}": packed}, []
        place = 2 * fields + 1
        stored = packed ^ 0x80808080 if bits == 8 else packed
        for field in range(fields):
            # A field counts more in its place: its scale is handed over by as much less.
            unit = 2.0 ** (field * bits)
            scales = [register(halves(drawn(generator)) / unit) for _ in range(2)]
            zeros = [drawn(generator) for _ in range(2)]
            for offset, given in enumerate((*scales, *zeros)):
                inputs[f"${place + offset}"] = given
            place += 4
            codes = [stored >> 8 * byte + field * bits & 2**bits - 1 for byte in range(4)]
            for pair in range(2):
                exact = halves(scales[pair]) * unit * codes[2 * pair : 2 * pair + 2]
                want += (exact + halves(zeros[pair])).astype("<f2").astype(float).tolist()

        assert run(assembly, inputs, 2 * fields) == want


def test_pairs_are_turned_by_their_angle() -> None:
    assembly = assembly_of(latent_turns, 0)
    generator = random.Random(0)

    for _ in range(100):
        given = [drawn(generator) for _ in range(4)]
        x, y, mean_x, mean_y = map(halves, given)
        angle = generator.uniform(-3, 3)
        cos, sin = (np.float16(f(angle)) for f in (np.cos, np.sin))
        inputs = {f"${2 + i}": number for i, number in enumerate(given)}
        inputs |= {"$6": register(np.array([cos, cos])), "$7": register(np.array([sin, sin]))}

        found = np.array(run(assembly, inputs, 2))

        first, second = x + mean_x, y + mean_y
        want = np.concatenate(
            [first * float(cos) - second * float(sin), second * float(cos) + first * float(sin)]
        )
        # Four roundings of float16, each of a number that is at most |first| + |second|.
        largest = np.abs(first).max() + np.abs(second).max()
        assert np.abs(found - want).max() <= 4 * 2.0**-11 * largest

"""Inline assembly of Gluon kernels, instruction by instruction with NumPy, for `gluon_interpreter`.

Registers are words of 32 bits, as arrays of 64 in which there is nothing above them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

_WORD = 0xFFFFFFFF


def _permuted(low: Any, high: Any, selector: Any) -> Any:
    """PTX `prmt.b32`: bit 3 of a selector asks for the sign of the byte in its place."""
    table = np.asarray(low, np.uint64) | np.asarray(high, np.uint64) << np.uint64(32)
    word = np.uint64(0)
    for i in range(4):
        nibble = np.asarray(selector, np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = table >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
        word = word | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return word


def _looked_up(a: Any, b: Any, c: Any, table: Any) -> Any:
    """PTX `lop3.b32`: bit by bit, by a table of eight."""
    found = np.uint64(0)
    for row in range(8):
        if int(table) >> row & 1:
            picked = [x if row >> bit & 1 else x ^ np.uint64(_WORD)
                      for x, bit in ((a, 2), (b, 1), (c, 0))]  # fmt: skip
            found = found | picked[0] & picked[1] & picked[2]
    return found


def _pairs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of registers of two float16, rounded once."""

    def apply(*words: Any) -> Any:
        halves = [
            np.asarray(word, np.uint64).astype("<u4")[..., None].view("<f2").astype(np.float64)
            for word in words
        ]
        with np.errstate(invalid="ignore", over="ignore"):
            found = np.ascontiguousarray(function(*halves).astype("<f2"))
        return found.view("<u4")[..., 0].astype(np.uint64)

    return apply


def _singles(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of registers of float32."""

    def apply(word: Any) -> Any:
        found = function(np.asarray(word, np.uint64).astype("<u4").view("<f4"))
        return found.astype("<f4").view("<u4").astype(np.uint64)

    return apply


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: np.asarray(a, np.uint64),
    "add.f16x2": _pairs(lambda a, b: a + b),
    "sub.f16x2": _pairs(lambda a, b: a - b),
    "mul.f16x2": _pairs(lambda a, b: a * b),
    "neg.f16x2": _pairs(lambda a: -a),
    "fma.rn.f16x2": _pairs(lambda a, b, c: a * b + c),
    "cos.approx.f32": _singles(np.cos),
    "sin.approx.f32": _singles(np.sin),
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.b32": lambda a, b: a >> b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "prmt.b32": _permuted,
    "lop3.b32": _looked_up,
}


def run(assembly: str, registers: dict[str, Any]) -> None:
    """Run all statements; registers are read and written by name, `$0` among them."""
    body = assembly.strip()
    for statement in (body[1:-1] if body.startswith("{") else body).split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            operation, arguments = statement.split(maxsplit=1)
            target, given = _operands(arguments)
            numbers = [registers[x] if x in registers else np.uint64(int(x, 0)) for x in given]
            found = _OPERATIONS[operation](*numbers) & np.uint64(_WORD)
            if isinstance(target, tuple):
                registers[target[0]] = found & np.uint64(0xFFFF)
                registers[target[1]] = found >> np.uint64(16)
            else:
                registers[target] = found


def _operands(arguments: str) -> tuple[str | tuple[str, ...], list[str]]:
    """What is written, or the two halves that are, and what is read."""
    if arguments.startswith("{"):
        halves, rest = arguments[1:].split("}")
        target: str | tuple[str, ...] = tuple(half.strip() for half in halves.split(","))
        return target, [argument.strip() for argument in rest.strip(" ,").split(",")]
    target, *given = (argument.strip() for argument in arguments.split(","))
    return target, given

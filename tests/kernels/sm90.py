"""Compiles kernels for a Hopper GPU where there is none, and reads what became of them.

The compiler needs no GPU, but it must not run in a process whose kernels are interpreted, so
`compiled` starts one without TRITON_INTERPRET for all configurations of a test file together.
Each takes one to five seconds where Triton's own cache does not have it.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.kernels import in_flight

MAX_SHARED_BYTES = 227 * 1024
"""What one block may have on an H100."""

_ROOT = Path(__file__).parents[2]
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One kernel as it would be launched."""

    name: str
    module: str
    """Where the kernel is, such as `kvcluster_kernels.decode`."""
    kernel: str
    signature: dict[str, str]
    """Of every argument that is no constexpr: `*bf16`, `i32`, `fp32`; with `:16` behind it where
    the launch finds it divisible by 16, as pointers of torch always are."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    is_gluon: bool = False


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """What the compiler made of a configuration."""

    num_registers: int
    num_spills: int
    """Loads and stores of local memory."""
    shared_bytes: int
    opcodes: dict[str, int]
    """Instructions by name up to the first point: `HGMMA`, `LDGSTS`."""
    loop_opcodes: dict[str, int] = field(repr=False)
    """The same of the longest innermost loop."""
    ttgir: str = field(repr=False)
    early_touches: list[str]
    """Instructions that touch registers of products under way (`in_flight`)."""

    def count(self, *names: str) -> int:
        return sum(self.opcodes.get(name, 0) for name in names)

    @property
    def loop_length(self) -> int:
        """Instructions that a warp runs for one turn of the loop."""
        return sum(self.loop_opcodes.values())


def compiled(configurations: Sequence[Configuration]) -> dict[str, MachineCode]:
    """By name. Raises: RuntimeError with the compiler's words for the first that it refuses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(_ROOT), str(_ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.sm90"],
        input=json.dumps([asdict(configuration) for configuration in configurations]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=_ROOT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return {name: MachineCode(**code) for name, code in json.loads(done.stdout).items()}


def _compile(configuration: Configuration) -> MachineCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    source_class = GluonASTSource if configuration.is_gluon else ASTSource
    function = getattr(import_module(configuration.module), configuration.kernel)
    types = {name: kind.partition(":")[0] for name, kind in configuration.signature.items()}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    divisible = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in configuration.signature.items()
        if kind.endswith(":16")
    }
    kernel = triton.compile(
        source_class(function, signature, configuration.constants, divisible),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
    )
    return read_cubin(kernel.asm["cubin"], kernel.metadata.shared, kernel.asm["ttgir"])


def read_cubin(cubin: bytes, shared_bytes: int, ttgir: str) -> MachineCode:
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing, usage = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    instructions = [
        (int(match[1], 16), match[2].partition(".")[0], match[2] + match[3])
        for match in _INSTRUCTION.finditer(listing)
    ]
    opcodes = Counter(opcode for _, opcode, _ in instructions)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return MachineCode(
        num_registers=int(registers[1]),
        num_spills=opcodes["STL"] + opcodes["LDL"],
        shared_bytes=shared_bytes,
        opcodes=dict(opcodes),
        loop_opcodes=dict(_longest_loop(instructions)),
        ttgir=ttgir,
        early_touches=in_flight.early_touches(in_flight.instructions(listing)),
    )


def _longest_loop(instructions: Sequence[tuple[int, str, str]]) -> Counter[str]:
    """The body of the longest jump back that no other is inside of."""
    jumps = []
    for address, opcode, text in instructions:
        target = _TARGET.search(text) if opcode == "BRA" else None
        if target and int(target[1], 16) < address:
            jumps.append((int(target[1], 16), address))
    jumps.sort()
    inner = [
        (start, end)
        for start, end in jumps
        if not any(
            (start, end) != other and start <= other[0] and other[1] <= end for other in jumps
        )
    ]
    longest = max(inner, key=lambda jump: jump[1] - jump[0], default=(1, 0))
    return Counter(
        opcode for address, opcode, _ in instructions if longest[0] <= address <= longest[1]
    )


def _main() -> None:
    configurations = [Configuration(**each) for each in json.load(sys.stdin)]
    json.dump({each.name: asdict(_compile(each)) for each in configurations}, sys.stdout)


if __name__ == "__main__":
    _main()

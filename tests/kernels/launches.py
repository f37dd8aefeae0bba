"""What our launchers ask Triton to compile for a Hopper GPU, where there is none.

A launch decides much of what is compiled: which pointers are None, which integers are 1 or
divisible by 16, which constants a kernel has. So launchers are called here with tensors on the CPU
and a driver that says that it has a Hopper GPU; what they hand to Triton is compiled, and nothing
runs.

A module with launches has `LAUNCHES`, calls by name. As in `sm90`, they are made in a process of
their own, without TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.kernels.sm90 import MachineCode, read_cubin

_ROOT = Path(__file__).parents[2]


def compiled(module: str, names: Sequence[str]) -> dict[str, MachineCode]:
    """The machine code of the first kernel of each launch. Raises: RuntimeError with the
    compiler's words for the first that it refuses."""
    answer = _answer("compile", module, names)
    return {name: MachineCode(**code) for name, code in answer.items()}


def refusals(module: str, names: Sequence[str]) -> dict[str, str]:
    """What Triton says against kernels of these launches before it makes machine code, which is
    most of what it says, in a tenth of the time. Those that it has nothing against are left out."""
    return _answer("translate", module, names)


def compile_keys(module: str, names: Sequence[str]) -> dict[str, list[str]]:
    """By launch: what each kernel that it launches is compiled for, with the kernel's name. Triton
    compiles it again for every other one, on the first launch that asks for it."""
    return _answer("keys", module, names)


def _answer(verb: str, module: str, names: Sequence[str]) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(_ROOT), str(_ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches", verb, module],
        input=json.dumps(list(names)),
        capture_output=True,
        text=True,
        env=environment,
        cwd=_ROOT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return dict(json.loads(done.stdout))


class _Hopper:
    """As much of a driver as a launch asks for before it compiles."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _asked() -> Iterator[list[dict[str, Any]]]:
    """What kernels launched meanwhile would be compiled with; they are not, and do not run."""
    from triton import knobs
    from triton.runtime import driver

    found: list[dict[str, Any]] = []

    def note(*, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        found.append({"function": fn.jit_function, **compile})
        return True

    driver.set_active(_Hopper())
    knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = None


def _source(asked: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    from triton.compiler.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = asked["function"]
    source_class = GluonASTSource if function.is_gluon() else ASTSource
    source = source_class(function, asked["signature"], asked["constants"], asked["configs"][0])
    return source, {key: asked[key] for key in ("num_warps", "num_stages")}


def _compile(launch: Callable[[], object]) -> dict[str, Any]:
    import triton

    with _asked() as found:
        launch()
    source, options = _source(found[0])
    kernel = triton.compile(source, target=_Hopper().target, options=options)
    code = read_cubin(kernel.asm["cubin"], kernel.metadata.shared, kernel.asm["ttgir"])
    return asdict(code)


def _refusal(launch: Callable[[], object]) -> str | None:
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend
    from triton.compiler.errors import CompilationError

    with _asked() as found:
        launch()
    assert found, "nothing was launched"
    target = _Hopper().target
    backend = make_backend(target)
    for asked in found:
        source, given = _source(asked)
        options = backend.parse_options({**given, **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        try:
            source.make_ir(target, options, functions, modules, context)
        except CompilationError as error:
            return str(error)
    return None


def _keys(launch: Callable[[], object]) -> list[str]:
    with _asked() as found:
        launch()
    assert found, "nothing was launched"
    return [f"{asked['function'].fn.__name__} {asked['key']}" for asked in found]


def _main(verb: str, module: str) -> None:
    launches = import_module(module).LAUNCHES
    names = json.load(sys.stdin)
    if verb == "compile":
        answer: dict[str, Any] = {name: _compile(launches[name]) for name in names}
    elif verb == "keys":
        answer = {name: _keys(launches[name]) for name in names}
    else:
        said = {name: _refusal(launches[name]) for name in names}
        answer = {name: words for name, words in said.items() if words is not None}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Real long texts that every machine with kvcluster's dependencies has, to calibrate and to judge.

They are read from installed packages, so another version of a package gives another text: results
name a text by its digest. No text shares a passage of `SHINGLE` characters with one before it in
`TEXT_NAMES`, and inside a text a passage that a later file repeats, such as a licence, is left out.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from pydoc_data import topics
from typing import Final

import numpy as np
from numpy.typing import NDArray

SHINGLE: Final = 64
"""Characters in a row that no two texts have in common."""
_MAX_CHARACTERS: Final = 400_000
"""Of one text: about 100,000 tokens."""
_PARAGRAPH: Final = re.compile(r"\n[ \t]*\n")


class Purpose(StrEnum):
    """Who may look at a text."""

    CALIBRATION = "calibration"
    """Codecs are fitted to it."""
    EVALUATION = "evaluation"
    """Recipes are chosen on some of them and reported on the others: see `held_out`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One long text."""

    name: str
    purpose: Purpose
    content: str

    @property
    def digest(self) -> str:
        """Tells two versions of a text apart."""
        return hashlib.blake2b(self.content.encode(), digest_size=8).hexdigest()


def load_texts() -> tuple[Text, ...]:
    """All texts, in the order of `TEXT_NAMES`. Reads files for a few seconds.

    Raises: LookupError naming a package that is not installed.
    """
    texts: list[Text] = []
    taken = np.empty(0, dtype=np.uint64)
    for name, (purpose, read) in _SOURCES.items():
        content = without_passages(_unrepeated(read()), taken)
        # Not union1d: numpy's hash table takes seconds for hashes such as these.
        taken = np.sort(np.concatenate((taken, shingles(content))))
        texts.append(Text(name=name, purpose=purpose, content=content))
    return tuple(texts)


def shingles(content: str) -> NDArray[np.uint64]:
    """A hash of each passage of `SHINGLE` characters, in order; empty for a shorter text."""
    codes = np.frombuffer(content.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    num_passages = max(0, len(codes) - SHINGLE + 1)
    # A polynomial over the characters, modulo 2**64.
    hashes = np.zeros(num_passages, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * _HASH_FACTOR + codes[offset : offset + num_passages]
    return hashes


def without_passages(content: str, taken: NDArray[np.uint64]) -> str:
    """The text without those lines that are part of a passage whose hash is in `taken`,
    which is sorted."""
    while len(taken):
        hashes = shingles(content)
        places = np.minimum(np.searchsorted(taken, hashes), len(taken) - 1)
        shared = np.flatnonzero(taken[places] == hashes)
        if not len(shared):
            return content
        is_shared = np.zeros(len(content), dtype=np.bool_)
        for place in shared:
            is_shared[place : place + SHINGLE] = True
        kept: list[str] = []
        start = 0
        for line in content.splitlines(keepends=True):
            if not is_shared[start : start + len(line)].any():
                kept.append(line)
            start += len(line)
        # Lines that become neighbours may make another shared passage.
        content = "".join(kept)
    return content


_HASH_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)


def _unrepeated(files: Iterable[str]) -> str:
    seen: set[str] = set()
    parts: list[str] = []
    length = 0
    for content in files:
        fresh = []
        for paragraph in _PARAGRAPH.split(content):
            words = " ".join(paragraph.split())
            if not words or (len(words) >= SHINGLE and words in seen):
                continue
            seen.add(words)
            fresh.append(paragraph.strip("\n"))
        parts.append("\n\n".join(fresh))
        length += len(parts[-1])
        if length >= _MAX_CHARACTERS:
            break
    return "\n\n".join(part for part in parts if part)[:_MAX_CHARACTERS]


def _language_manual() -> Iterator[str]:
    return (topics.topics[name] for name in sorted(topics.topics))


def _standard_library() -> Iterator[str]:
    return _files("*.py", *((name, "") for name in _CALIBRATION_MODULES))


def _interfaces() -> Iterator[str]:
    return _files("*.proto", *(("google", inside) for inside in ("api", "rpc", "type", "logging")))


def _tensor_library() -> Iterator[str]:
    return _files("*.h", ("torch", "include/c10"))


def _tensor_manual() -> Iterator[str]:
    source = _directories("torch")[0] / "_torch_docs.py"
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _docstrings(package: str, inside: str) -> Iterator[str]:
    for content in _files("*.py", (package, inside)):
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _graph_theory() -> Iterator[str]:
    return _docstrings("networkx", "algorithms")


def _algebra() -> Iterator[str]:
    return _docstrings("sympy", "")


_CALIBRATION_MODULES: Final = (
    "asyncio", "concurrent", "email", "http", "json", "logging", "multiprocessing", "unittest",
    "urllib", "xml",
)  # fmt: skip

_SOURCES: Final[dict[str, tuple[Purpose, Callable[[], Iterable[str]]]]] = {
    "language-manual": (Purpose.CALIBRATION, _language_manual),
    "standard-library": (Purpose.CALIBRATION, _standard_library),
    "interfaces": (Purpose.EVALUATION, _interfaces),
    "tensor-library": (Purpose.EVALUATION, _tensor_library),
    "tensor-manual": (Purpose.EVALUATION, _tensor_manual),
    "graph-theory": (Purpose.EVALUATION, _graph_theory),
    "algebra": (Purpose.EVALUATION, _algebra),
}

TEXT_NAMES: Final = tuple(_SOURCES)
"""language-manual: English about Python. standard-library: Python. interfaces: protocol buffers,
mostly English comments. tensor-library: C++. tensor-manual: English with formulas. graph-theory
and algebra: English and worked examples."""


def _files(pattern: str, *places: tuple[str, str]) -> Iterator[str]:
    for package, inside in places:
        for directory in _directories(package):
            for path in sorted((directory / inside).rglob(pattern)):
                if "tests" not in path.parts and path.is_file():
                    yield path.read_text("utf-8", errors="replace")


def _directories(package: str) -> tuple[Path, ...]:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"package {package}, which texts are read from, is not installed")
    return tuple(Path(place) for place in sorted(spec.submodule_search_locations))

"""One sealed file: a header and records, each sealed by itself and bound to its place.

    magic 8 · salt 32 · length of the header 8 · header · record 0 · record 1 · ...

The file's key comes from the spill's key and the salt (HKDF-SHA256), and is used for this file
alone; so nonces are simply counted, the header being 0 and record i being i + 1, and none is ever
used twice (NIST SP 800-38D, 8.2.1). The additional data of each says where it belongs: tenant,
context, spill, part, and for a record its number, block key and position. A record that was
changed, cut short, moved, or taken from another file is refused.
"""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvcluster.cache.spill import SpillOwner, SpillTicket
from kvcluster.errors import SealedCacheDamaged

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
_MAGIC: Final = b"kvcseal\x01"
_SALT_BYTES: Final = 32
_LENGTH_BYTES: Final = 8
_START: Final = len(_MAGIC) + _SALT_BYTES + _LENGTH_BYTES
_MAX_HEADER_BYTES: Final = 256 * 1024 * 1024


class RecordPlace(msgspec.Struct, frozen=True, array_like=True):
    """What one record holds."""

    kind: str
    """`exact` or `encoded`: the form of the block."""
    group: int
    """KV group."""
    entry: int
    """Position of the block in the sequence, in blocks."""
    num_bytes: int
    """Of its content."""
    block_key: bytes = b""
    """Keyed hash of the block's tokens and all before them, where it has one."""


class PartHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of itself, sealed like the rest."""

    content: bytes
    """Whatever the reader of the records needs."""
    places: tuple[RecordPlace, ...]


class PartPlace(msgspec.Struct, frozen=True, array_like=True):
    """Which file of which spill."""

    owner: SpillOwner
    spill: str
    part: int
    num_parts: int


def part_of(ticket: SpillTicket, part: int) -> PartPlace:
    return PartPlace(ticket.owner, ticket.spill, part, ticket.num_parts)


def part_file(ticket: SpillTicket, part: int) -> Path:
    return Path(ticket.folder) / part_name(part)


def part_name(part: int) -> str:
    """Of the file within its spill's folder."""
    return f"part-{part:05d}.sealed"


def sealed_bytes(header: PartHeader) -> int:
    """Bytes of the whole file, known before it is written."""
    sealed_header = len(msgspec.msgpack.encode(header)) + TAG_BYTES
    return _START + sealed_header + sum(place.num_bytes + TAG_BYTES for place in header.places)


class PartWriter:
    """Writes a file front to back. `add` once for each of the header's places, in order."""

    def __init__(self, file: BinaryIO, key: bytes, place: PartPlace, header: PartHeader) -> None:
        self.salt = secrets.token_bytes(_SALT_BYTES)
        self._file = file
        self._cipher = _cipher(key, self.salt)
        self._place = place
        self._places = header.places
        self._num_added = 0
        sealed = self._cipher.encrypt(
            _nonce(0), msgspec.msgpack.encode(header), _header_text(place)
        )
        length = len(sealed).to_bytes(_LENGTH_BYTES, "big")
        self._file.write(_MAGIC + self.salt + length + sealed)

    def add(self, content: bytes | memoryview) -> None:
        """Seal and write the next record. Raises: OSError."""
        index = self._num_added
        place = self._places[index]
        assert len(content) == place.num_bytes, f"record {index} is as long as was said"
        text = _record_text(self._place, index, place)
        self._file.write(self._cipher.encrypt(_nonce(index + 1), content, text))
        self._num_added += 1

    def finish(self) -> int:
        """Flush to the disk itself. Returns the file's size in bytes. Raises: OSError."""
        assert self._num_added == len(self._places), "every record was added"
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


class PartReader:
    """Reads a file whose salt is known from elsewhere. Holds it open until `close`."""

    def __init__(self, path: Path, key: bytes, place: PartPlace, salt: bytes) -> None:
        """Reads the header. Raises: SealedCacheDamaged, OSError."""
        self._path = path
        self._place = place
        self._file = path.open("rb")
        try:
            self.header = self._read_header(key, salt)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self, index: int) -> bytes:
        """The content of record `index`. Raises: SealedCacheDamaged, OSError."""
        place = self.header.places[index]
        self._file.seek(self._offsets[index])
        sealed = self._file.read(place.num_bytes + TAG_BYTES)
        return self._opened(sealed, index + 1, _record_text(self._place, index, place))

    def _read_header(self, key: bytes, salt: bytes) -> PartHeader:
        start = self._file.read(_START)
        length = int.from_bytes(start[-_LENGTH_BYTES:], "big")
        if not start.startswith(_MAGIC + salt) or len(start) < _START or not salt:
            raise self._damaged("does not begin as it was written")
        if length > min(_MAX_HEADER_BYTES, self._path.stat().st_size):
            raise self._damaged("is shorter than it says")
        self._cipher = _cipher(key, salt)
        opened = self._opened(self._file.read(length), 0, _header_text(self._place))
        header = msgspec.msgpack.decode(opened, type=PartHeader)
        self._offsets = _offsets(_START + length, header.places)
        if self._path.stat().st_size != sealed_bytes(header):
            raise self._damaged("is longer or shorter than it was written")
        return header

    def _opened(self, sealed: bytes, count: int, text: bytes) -> bytes:
        try:
            return self._cipher.decrypt(_nonce(count), sealed, text)
        except (InvalidTag, ValueError) as error:
            what = f"record {count - 1}" if count else "the header"
            raise self._damaged(f"{what} was changed, cut short or moved") from error

    def _damaged(self, what: str) -> SealedCacheDamaged:
        return SealedCacheDamaged(
            f"sealed cache file {self._path.name} of {self._place.spill}: {what}: compute the "
            "context again"
        )


def _offsets(start: int, places: Sequence[RecordPlace]) -> list[int]:
    offsets = []
    for place in places:
        offsets.append(start)
        start += place.num_bytes + TAG_BYTES
    return offsets


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    derive = HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=b"kvcluster sealed part")
    return AESGCM(derive.derive(key))


def _nonce(count: int) -> bytes:
    return count.to_bytes(12, "big")


def _header_text(place: PartPlace) -> bytes:
    return msgspec.msgpack.encode(["header", place])


def _record_text(part: PartPlace, index: int, place: RecordPlace) -> bytes:
    return msgspec.msgpack.encode(["record", part, index, place])

"""What operators publish for all tenants, as the tenants' database keeps it."""

import msgspec


class PublishedPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """One prefix: text or token ids."""

    prefix: str
    model: str = ""
    """Empty: every model that is served."""
    policy: str = ""
    text: str = ""
    packed_ids: bytes = b""
    """Little-endian u32; empty: it is text."""
    create_time_s: float = 0.0
    is_withdrawn: bool = False
    """Taken back, and not yet from all engines."""

    @property
    def name(self) -> str:
        return f"publishedPrefixes/{self.prefix}"

"""Pages of a list. A token names the last item that was given, so that items which come or go
between two pages neither repeat nor hide others.
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from kvcluster.errors import InvalidField

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

ItemT = TypeVar("ItemT")


class Page(NamedTuple, Generic[ItemT]):
    items: list[ItemT]
    next_token: str
    """Empty: this is the last page."""


def page_of(
    items: Iterable[ItemT], *, key: Callable[[ItemT], str], page_size: int, page_token: str
) -> Page[ItemT]:
    """The page after `page_token`, in the order of `key`, which is unique.

    Raises: InvalidField for a negative size or a token that is none.
    """
    size = _checked_size(page_size)
    after = _key_in(page_token)
    rest = sorted((item for item in items if key(item) > after), key=key)
    is_last = len(rest) <= size
    return Page(rest[:size], "" if is_last else _token_of(key(rest[size - 1])))


def page_from(
    fetch: Callable[[str, int], Sequence[ItemT]],
    *,
    key: Callable[[ItemT], str],
    keep: Callable[[ItemT], bool],
    page_size: int,
    page_token: str,
) -> Page[ItemT]:
    """The page after `page_token` of a list that is too long to be read whole.

    `fetch(after, count)` gives the first `count` items after a key, in the list's own order; those
    that are not to `keep` are passed over. Raises: as `page_of`.
    """
    size = _checked_size(page_size)
    after, kept = _key_in(page_token), list[ItemT]()
    while len(kept) <= size:
        items = fetch(after, size + 1)
        kept.extend(filter(keep, items))
        if len(items) <= size:
            break
        after = key(items[-1])
    is_last = len(kept) <= size
    return Page(kept[:size], "" if is_last else _token_of(key(kept[size - 1])))


def _checked_size(page_size: int) -> int:
    if page_size < 0:
        raise InvalidField("page_size", f"want 0 or more, got {page_size}")
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def _token_of(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def _key_in(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidField("page_token", "is none that this server gave: start again") from error

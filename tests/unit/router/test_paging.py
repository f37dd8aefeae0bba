"""Pages of a list that changes meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.errors import InvalidField
from kvcluster.router.paging import MAX_PAGE_SIZE, page_of


def read_pages(items: set[str], size: int) -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = page_of(items, key=str, page_size=size, page_token=token)
        pages.append(page.items)
        if not page.next_token:
            return pages
        token = page.next_token


@given(st.sets(st.text(min_size=1, max_size=3), max_size=30), st.integers(1, 10))
def test_pages_hold_every_item_once_and_in_order(items: set[str], size: int) -> None:
    pages = read_pages(items, size)

    assert [item for page in pages for item in page] == sorted(items)
    assert all(len(page) <= size for page in pages)


def test_items_that_vanish_or_come_between_pages_disturb_no_others() -> None:
    first = page_of("abcd", key=str, page_size=2, page_token="")

    second = page_of("0ccde", key=str, page_size=9, page_token=first.next_token)

    assert "".join(second.items) == "ccde"


def test_a_page_is_never_larger_than_the_limit() -> None:
    items = [f"{number:05}" for number in range(MAX_PAGE_SIZE + 1)]

    page = page_of(items, key=str, page_size=10 * MAX_PAGE_SIZE, page_token="")

    assert len(page.items) == MAX_PAGE_SIZE


@pytest.mark.parametrize("token", ["é", "a", "____", "YQ==x"])
def test_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(InvalidField, match="page_token"):
        page_of("ab", key=str, page_size=1, page_token=token)

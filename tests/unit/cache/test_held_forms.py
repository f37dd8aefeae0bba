"""Which forms an entry has to hold, and an entry cut down to them."""

from itertools import product

import pytest

from kvcluster.cache.block_table import TableEntry
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.held_forms import Form, FormsAt, HeldForms, restricted
from kvcluster.types import NO_BLOCK, Rank

IDS = (NO_BLOCK, 5)
EXACT_IDS = tuple(product(IDS, repeat=2))
ENCODED_IDS = ((), *EXACT_IDS)


def ids_of(entry: TableEntry, form: Form) -> tuple[int, ...]:
    ids = entry.block_ids if form is Form.EXACT else entry.encoded_ids
    return tuple(ids) or (NO_BLOCK,) * len(entry.block_ids)


@pytest.mark.parametrize("needs", list(product(Form, repeat=2)))
@pytest.mark.parametrize("encoded", ENCODED_IDS)
@pytest.mark.parametrize("exact", EXACT_IDS)
def test_an_entry_is_cut_down_to_what_is_needed_of_it(
    exact: tuple[int, ...], encoded: tuple[int, ...], needs: tuple[Form, ...]
) -> None:
    entry = TableEntry(Rank(1), exact, encoded)  # type: ignore[arg-type]
    cut = restricted(entry, needs)

    for form in (Form.EXACT, Form.ENCODED):
        assert ids_of(cut, form) == tuple(
            block if needed is form else NO_BLOCK
            for block, needed in zip(ids_of(entry, form), needs, strict=True)
        )
    assert cut.rank == 1


@pytest.mark.parametrize("codec", ["exact", "int4"])
@pytest.mark.parametrize("windows", [(None,), (None, None), (None, 8), (6, 40)])
def test_what_no_later_row_reads_is_not_needed(windows: tuple[int | None, ...], codec: str) -> None:
    at = HeldForms(windows, 4, codec, ExactRegion(2)).at(20)
    for entry in range(20):
        needs = at.needs(entry)
        is_exact = codec == "exact" or entry == 0 or entry >= at.first_exact
        for released, form in zip(at.released, needs, strict=True):
            expected = Form.EXACT if is_exact else Form.ENCODED
            assert form is (Form.NONE if entry in released else expected)
    assert isinstance(at, FormsAt)

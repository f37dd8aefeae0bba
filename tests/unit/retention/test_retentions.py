"""Every retention policy keeps the protocol's promises; each new one inherits these tests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.retention.registry import RETENTIONS


@given(num_tokens=st.integers(0, 10**7), more=st.integers(0, 10**6))
@pytest.mark.parametrize("name", sorted(RETENTIONS))
def test_what_was_dropped_never_comes_back(name: str, num_tokens: int, more: int) -> None:
    policy = RETENTIONS[name]

    assert 0 <= policy.first_kept(num_tokens) <= num_tokens
    assert policy.first_kept(num_tokens) <= policy.first_kept(num_tokens + more)


def test_full_drops_nothing() -> None:
    assert RETENTIONS["full"].first_kept(10**9) == 0

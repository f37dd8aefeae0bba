"""Resource names."""

import pytest

from kvcluster.errors import GenerationNotFound, InvalidField
from kvcluster.router import names
from kvcluster.types import DEFAULT_TENANT, GenerationId


def test_a_name_gives_its_id_back() -> None:
    name = names.generation_name(DEFAULT_TENANT, GenerationId("0f-3_a"))

    assert names.generation_of(name, DEFAULT_TENANT) == "0f-3_a"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "0f3a",
        "tenants/default",
        "tenants/default/generations/",
        "tenants/default/generations/a/b",
        "tenants/default/generations/a\n",
        "tenants/../generations/a",
        "tenants/default/generations/" + "a" * 129,
    ],
)
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidField, match="name"):
        names.generation_of(name, DEFAULT_TENANT)


def test_another_tenants_name_is_not_found() -> None:
    with pytest.raises(GenerationNotFound):
        names.generation_of("tenants/other/generations/a", DEFAULT_TENANT)

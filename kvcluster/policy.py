"""The policy language: how a request names the compression of its cache, `codec + retention`.

Words may come in any order, each at most once; what is left out takes its default.
"""

from collections.abc import Collection

from kvcluster.errors import InvalidField
from kvcluster.types import Policy

FIELD = "policy"


def parse_policy(text: str, *, codecs: Collection[str], retentions: Collection[str]) -> Policy:
    """The policy that `text` names; empty: exact storage of every token.

    Raises: InvalidField for a word that is unknown, empty or given twice.
    """
    if not text.strip():
        return Policy()
    chosen: dict[str, str] = {}
    for raw_word in text.split("+"):
        word = raw_word.strip()
        plug_point = _plug_point(word, codecs=codecs, retentions=retentions)
        if plug_point in chosen:
            raise InvalidField(
                FIELD, f"names two of one kind ({plug_point}): {chosen[plug_point]} and {word}"
            )
        chosen[plug_point] = word
    return Policy(**chosen)


def _plug_point(word: str, *, codecs: Collection[str], retentions: Collection[str]) -> str:
    if word in codecs:
        return "codec"
    if word in retentions:
        return "retention"
    raise InvalidField(
        FIELD,
        f"no codec or retention is called {word!r}; codecs: {', '.join(sorted(codecs))}; "
        f"retentions: {', '.join(sorted(retentions))}",
    )

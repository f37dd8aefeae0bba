"""Attacks on the names of cached blocks: prompts that a careless name would confuse with another.

Names are keyed with a secret, so an attacker cannot make two collide. What it can do is to send
what differs from a cached prompt in one respect that a name may leave out: the order, the place, a
token, the length ("Cache Me, Catch You", NDSS 2026; CVE-2025-46722 left out a shape).
"""

import secrets
from collections.abc import Mapping, Sequence

from kvcluster.audit.attack import Outcome, attack, breached, held, inconclusive
from kvcluster.audit.scene import Scene

_VOCABULARY = 100
"""Ids below it are in every vocabulary; 0 is often special."""


@attack(
    tries="prompts that are like a cached one but for their order, place or a token",
    breach="more of one is reported as cached than it has in common with a prompt that was sent",
)
async def confused_prompts(scene: Scene) -> Outcome:
    prompt = [1 + secrets.randbelow(_VOCABULARY - 1) for _ in range(scene.target.prompt_tokens)]
    await scene.generate(scene.attacker, prompt)
    control = (await scene.generate(scene.attacker, prompt)).cached_tokens
    variants, sent = _variants(prompt), [prompt]
    for name, variant in variants.items():
        cached = (await scene.generate(scene.attacker, variant)).cached_tokens
        common = max(_common(each, variant) for each in sent)
        if cached > common:
            return breached(
                f"of a prompt with {name}, {cached} tokens are reported as cached; only {common} "
                "were ever sent before"
            )
        sent.append(variant)
    if not control:
        return inconclusive(
            "a tenant's own second use of a prompt is not reported as cached: there is no prefix "
            "cache"
        )
    return held(
        "prompts that nearly equal a cached one share no more than their beginning",
        variants=len(variants),
        control_tokens=control,
    )


def _variants(prompt: Sequence[int]) -> Mapping[str, list[int]]:
    half, own = len(prompt) // 2, list(prompt)
    other = 1 + prompt[0] % (_VOCABULARY - 1)
    return {
        "its halves in the other order": [*own[half:], *own[:half]],
        "its tokens backwards": own[::-1],
        "another first token": [other, *own[1:]],
        "a token more before it": [other, *own],
        "its first token left out": own[1:],
        "its second half twice": [*own[half:], *own[half:]],
        "another token in the middle": [*own[:half], 1 + own[half] % 99, *own[half + 1 :]],
    }


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


ATTACKS = (confused_prompts,)

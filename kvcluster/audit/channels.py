"""Attacks on what is not said: times, hits of the prefix cache, and evictions.

Each is paired with a control within one tenant: where that shows nothing, nothing follows from
seeing nothing across two (vLLM PR 53347: isolation tests that pass because caching is off). Times
are taken interleaved at random, of fresh prompts, so that drift meets all arms alike and no probe
primes itself (Gu et al., "Auditing Prompt Caching in Language Model APIs", ICML 2025).
"""

import random
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack

from kvcluster.audit.attack import Outcome, attack, breached, held, inconclusive
from kvcluster.audit.scene import OPEN_STREAMS, Party, Scene, Served, generate_with
from kvcluster.audit.statistics import Difference, difference, levelled
from kvcluster.audit.wire import bearer, stream
from kvcluster.client import Client
from kvcluster.engine.api import Admitted
from kvcluster.rpc.v1 import inference_service_pb2 as pb
from kvcluster.tenancy.api_key import make_secret

_WARM_UP = 5
_AGAIN = 4
"""A difference is measured again with so many times the samples before it counts,"""
_MOST_AGAIN = 12_000
"""but with no more than these, or as many as before."""
_CONTROL_SAMPLES = 200
_VOCABULARY = 100
"""Ids below it are in every vocabulary; 0 is often special."""
_PROBED_PROMPTS = 8
_RANDOM_CHARS = 43
"""Of a secret: what comes after the part that finds its record."""

Probe = Callable[[], Awaitable[float]]
"""Seconds that something takes."""


async def interleaved(
    probes: Mapping[str, Probe], num_samples: int, chance: random.Random
) -> dict[str, list[float]]:
    """Times of every probe: each once in a round, in random order, after a warm-up. So whatever
    slows the machine for a while slows all alike."""
    for name in [*probes] * _WARM_UP:
        await probes[name]()
    times: dict[str, list[float]] = {name: [] for name in probes}
    for _ in range(num_samples):
        for name in chance.sample([*probes], k=len(probes)):
            times[name].append(await probes[name]())
    return times


def _again(num_samples: int) -> int:
    return max(num_samples, min(_AGAIN * num_samples, _MOST_AGAIN))


async def compared(
    one: Probe, other: Probe, num_samples: int, *, confirms: bool = True
) -> Difference:
    """How the times of two probes differ. `confirms`: a leak is measured twice, the second time
    with more samples, and the second decides."""
    chance = random.Random(secrets.randbits(64))
    found = Difference(0.0, 1.0, 0.0, 0)
    for count in (num_samples, _again(num_samples))[: 2 if confirms else 1]:
        times = await interleaved({"one": one, "other": other}, count, chance)
        found = difference(*levelled(times["one"], times["other"]))
        if not found.is_leak:
            break
    return found


@attack(
    tries="prompts that the victim has just had computed, and prompts that nobody has, and whether "
    "the first token tells which",
    breach="the server reports cached tokens, or the times differ by more than chance",
)
async def prefix_timing(scene: Scene) -> Outcome:
    tls, address = scene.target.tls, scene.target.address
    async with (
        Client(address, api_key=scene.attacker.secret, tls=tls) as attacker,
        Client(address, api_key=scene.victim.secret, tls=tls) as victim,
    ):
        seen = _Seen()

        async def primed_by(primer: Client, name: str) -> float:
            prompt = _fresh_prompt(scene.target.prompt_tokens)
            await generate_with(primer, prompt)
            return seen.note(name, await generate_with(attacker, prompt))

        async def unprimed() -> float:
            # The victim computes another prompt first: what went before is alike in all arms.
            await generate_with(victim, _fresh_prompt(scene.target.prompt_tokens))
            prompt = _fresh_prompt(scene.target.prompt_tokens)
            return seen.note("nobody", await generate_with(attacker, prompt))

        num_samples = scene.target.num_samples
        # What a tenant saves itself is milliseconds, which few samples show.
        control = await compared(
            lambda: primed_by(attacker, "itself"),
            unprimed,
            min(num_samples, _CONTROL_SAMPLES),
            confirms=False,
        )
        across = await compared(
            lambda: primed_by(victim, "victim"), unprimed, num_samples, confirms=False
        )
        if across.is_leak and not seen.cached["victim"]:
            across = await compared(
                lambda: primed_by(victim, "victim"),
                unprimed,
                _again(num_samples),
                confirms=False,
            )
    measured = {"t": across.t, "ks_p": across.ks_p, "control_t": control.t}
    if seen.cached["victim"]:
        return breached("tokens that the victim had computed are reported as cached", **measured)
    if across.is_leak:
        return breached(
            f"first tokens tell what the victim has had computed: {across.median_s * 1e6:+.0f} us",
            **measured,
        )
    if not control.is_leak and not seen.cached["itself"]:
        return inconclusive(
            "a tenant's own second use of a prompt is not faster: there is no prefix cache, or "
            "nothing can be measured here",
            **measured,
        )
    return held("a tenant's second use of a prompt shows, another tenant's does not", **measured)


class _Seen:
    """Tokens that were reported as cached, by who had them computed."""

    def __init__(self) -> None:
        self.cached = {"itself": 0, "victim": 0, "nobody": 0}

    def note(self, name: str, served: Served) -> float:
        self.cached[name] += served.cached_tokens
        return served.first_token_s


def _fresh_prompt(num_tokens: int) -> list[int]:
    return [1 + secrets.randbelow(_VOCABULARY - 1) for _ in range(num_tokens)]


@attack(
    tries="whether being refused an id that the victim has takes longer than one that nobody has",
    breach="the times differ by more than chance",
)
async def existence_timing(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "GetGeneration")
    theirs = scene.victim_generation.rpartition("/")[2]
    prefix = f"{scene.attacker.name}/generations"

    def asking(generation: Callable[[], str]) -> Probe:
        async def probe() -> float:
            request = pb.GetGenerationRequest(name=f"{prefix}/{generation()}")
            start = time.perf_counter()
            await scene.ask(method, request, bearer(scene.attacker.secret))
            return time.perf_counter() - start

        return probe

    def absent() -> str:
        return "".join(secrets.choice("0123456789abcdef") for _ in theirs)

    found = await compared(asking(lambda: theirs), asking(absent), 4 * scene.target.num_samples)
    measured = {"t": found.t, "ks_p": found.ks_p, "median_us": found.median_s * 1e6}
    if found.is_leak:
        return breached("refusals tell by their time what the victim has", **measured)
    return held("refusals take as long for the victim's ids as for nobody's", **measured)


@attack(
    tries="whether a secret takes longer to refuse when the server knows a key that begins like it",
    breach="the times differ by more than chance",
)
async def credential_timing(scene: Scene) -> Outcome:
    method = scene.method("InferenceService", "ListModels")
    known = scene.victim.secret[:-_RANDOM_CHARS]

    def asking(secret: Callable[[], str]) -> Probe:
        async def probe() -> float:
            metadata = bearer(secret())
            start = time.perf_counter()
            await scene.ask(method, pb.ListModelsRequest(), metadata)
            return time.perf_counter() - start

        return probe

    def begun() -> str:
        return known + make_secret().text[-_RANDOM_CHARS:]

    num_samples = 4 * scene.target.num_samples
    found = await compared(asking(begun), asking(lambda: make_secret().text), num_samples)
    measured = {"t": found.t, "ks_p": found.ks_p, "median_us": found.median_s * 1e6}
    if found.is_leak:
        return breached("refusals tell by their time which keys there are", **measured)
    return held("guesses are refused as slowly whether or not they begin like a key", **measured)


@attack(
    tries="filling the tenant's own cache, and whether the victim's work evicts any of it",
    breach="prompts that stay cached while the victim rests are evicted while it works",
)
async def eviction_probing(scene: Scene) -> Outcome:
    resting = await _hits_after(scene, victims_prompts=0)
    working = await _hits_after(scene, victims_prompts=4 * _PROBED_PROMPTS)
    measured = {"hits_resting": float(resting), "hits_working": float(working)}
    if not resting:
        return inconclusive(
            "a tenant's own prompts are not reported as cached: there is no prefix cache, or the "
            "tenant has no floor in it",
            **measured,
        )
    if working < resting:
        return breached(
            "the victim's work evicts the attacker's prompts, which tells of it", **measured
        )
    return held("what the attacker has cached does not tell whether the victim works", **measured)


async def _hits_after(scene: Scene, *, victims_prompts: int) -> int:
    """How many of some prompts are cached after the victim has had others computed."""
    prompts = [_fresh_prompt(scene.target.prompt_tokens) for _ in range(_PROBED_PROMPTS)]
    await _serve_all(scene, scene.attacker, prompts)
    others = [_fresh_prompt(scene.target.prompt_tokens) for _ in range(victims_prompts)]
    await _serve_all(scene, scene.victim, others)
    return sum(
        served.cached_tokens > 0 for served in await _serve_all(scene, scene.attacker, prompts)
    )


async def _serve_all(scene: Scene, party: Party, prompts: Sequence[Sequence[int]]) -> list[Served]:
    async with Client(scene.target.address, api_key=party.secret, tls=scene.target.tls) as client:
        return [await generate_with(client, prompt) for prompt in prompts]


@attack(
    tries="the place in the queue that the server tells, while the victim has work waiting and not",
    breach="it counts the victim's requests",
)
async def queue_position(scene: Scene) -> Outcome:
    resting = await _position(scene)
    method = scene.method("InferenceService", "StreamGenerate")
    async with AsyncExitStack() as stack:
        for _ in range(OPEN_STREAMS):
            call = await stack.enter_async_context(stream(scene.data, method, scene.victim.key))
            setup = pb.GenerateRequest(max_output_tokens=1)
            await call.write(pb.StreamGenerateRequest(setup=setup).SerializeToString())
            await call.read()  # Admitted
        working = await _position(scene)
    measured = {"resting": float(resting), "working": float(working)}
    if resting != working:
        return breached("the place in the queue tells of the victim's requests", **measured)
    return held("the place in the queue counts the tenant's own requests", **measured)


async def _position(scene: Scene) -> int:
    async with Client(
        scene.target.address, api_key=scene.attacker.secret, tls=scene.target.tls
    ) as client:
        events = client.generate(prompt_ids=[1, 2, 3], max_output_tokens=1)
        found = [event.event async for event in events if isinstance(event.event, Admitted)]
    return found[0].queue_position


ATTACKS = (
    prefix_timing,
    existence_timing,
    credential_timing,
    eviction_probing,
    queue_position,
)

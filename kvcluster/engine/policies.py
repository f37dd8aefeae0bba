"""Which policy a request runs with: its own, its tenant's, the model's, or none; and whether this
model can serve it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvcluster.engine.api import GenerationRequest, PolicySource
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.pooling import pooling_refusal
from kvcluster.errors import ConfigError, InvalidField, PolicyUnsupported
from kvcluster.policy import parse_policy
from kvcluster.policy_bounds import MeasuredRecipe, parse_bound, resolve
from kvcluster.tenancy.limits import NO_LIMITS, TenantLimits, allows, check_allowed
from kvcluster.types import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenPolicy:
    """A policy that this model can serve, and where it came from."""

    policy: Policy
    source: PolicySource
    bound: str = ""
    """The bound that it was chosen for, in canonical text; empty: it was named."""


def choose_policy(request: GenerationRequest, parts: EngineParts) -> ChosenPolicy:
    """The request's policy, else its tenant's, else the model's, else exact storage.

    Raises: InvalidField for text that is no policy on the menu; PolicyUnsupported when the model
    cannot serve it, or nothing measured meets its bound; PermissionDenied when the tenant may not
    use it.
    """
    texts = {
        PolicySource.REQUEST: request.policy,
        PolicySource.TENANT: (
            request.limits.default_policy or parts.tenant_policies.get(request.tenant, "")
        ),
        PolicySource.MODEL: parts.default_policy,
    }
    source = next((source for source, text in texts.items() if text.strip()), None)
    if source is None:
        chosen = ChosenPolicy(policy=Policy(), source=PolicySource.DEPLOYMENT)
    else:
        chosen = _chosen(texts[source], source, parts, request.limits)
    check_allowed(request.limits, chosen.policy)
    return chosen


def default_policy(parts: EngineParts) -> Policy:
    """The policy of a request that names none, of a tenant without a default.

    Raises: ConfigError, naming the setting, when this or a tenant's default cannot be served.
    """
    for tenant, text in parts.tenant_policies.items():
        _checked(f"tenant_policies.{tenant}", text, parts)
    return _checked("default_policy", parts.default_policy, parts)


def _chosen(
    text: str, source: PolicySource, parts: EngineParts, limits: TenantLimits = NO_LIMITS
) -> ChosenPolicy:
    bound = parse_bound(text)
    if bound is not None:
        if parts.unmeasured:
            raise PolicyUnsupported(f"{bound}: {parts.unmeasured}")
        named = resolve(bound, tuple(_servable(parts, limits)))
        return ChosenPolicy(policy=parse_policy(named, parts.menu), source=source, bound=str(bound))
    policy = parse_policy(text, parts.menu)
    refusal = _refusal(policy, parts)
    if refusal is not None:
        raise PolicyUnsupported(
            f"policy: {policy} cannot be served with {parts.spec.name}: {refusal}",
            metadata={"policy": str(policy)},
        )
    return ChosenPolicy(policy=policy, source=source)


def _refusal(policy: Policy, parts: EngineParts) -> str | None:
    return parts.refusal(policy) or pooling_refusal(policy, parts)


def _servable(parts: EngineParts, limits: TenantLimits) -> Iterator[MeasuredRecipe]:
    """The measured recipes without those of methods that are not offered here, or not allowed."""
    for recipe in parts.recipes:
        try:
            policy = parse_policy(recipe.policy, parts.menu)
        except InvalidField:
            continue
        if allows(limits, policy) and _refusal(policy, parts) is None:
            yield recipe


def _checked(setting: str, text: str, parts: EngineParts) -> Policy:
    if not text.strip():
        return Policy()
    try:
        return _chosen(text, PolicySource.MODEL, parts).policy
    except (InvalidField, PolicyUnsupported) as error:
        rule = error.message.removeprefix("policy: ")
        raise ConfigError(f"{setting}: {rule} (in {text!r})") from error

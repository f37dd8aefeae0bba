"""Whether a policy that pools KV heads is admitted: where its cost was measured, and is small.

Pooled heads ruin most models that were not trained with them (`codec/README.md` has a measurement),
so the burden of proof is turned round: no measurement, no admission, unless the operator says so.
"""

from kvcluster.engine.parts import EngineParts
from kvcluster.errors import InvalidField
from kvcluster.policy import parse_policy
from kvcluster.policy_bounds import MeasuredRecipe
from kvcluster.types import Policy


def pooling_refusal(policy: Policy, parts: EngineParts) -> str | None:
    """Why a policy is not admitted because of its sharing; None: it is."""
    if policy.sharing == Policy().sharing:
        return None
    bound, recipe = parts.config.max_pooling_loss, _measured(policy, parts)
    if recipe is None:
        if parts.config.admit_unmeasured_pooling:
            return None
        if parts.unmeasured:
            return f"what pooled heads cost here is not known: {parts.unmeasured}"
        return (
            "pooled heads ruin most models that were not trained with them, and what they cost "
            f"this one has not been measured: run `kvcluster calibrate --policy '{policy}'` and "
            "serve with its file, or serve with --set engine.admit_unmeasured_pooling=true"
        )
    if recipe.perplexity_increase <= bound:
        return None
    return (
        f"perplexity was measured to be {recipe.perplexity_increase:+.2%} with it "
        f"(± {recipe.perplexity_error:.2%}), over the bound of {bound:.2%}: name another policy, "
        "or serve with a higher --set engine.max_pooling_loss"
    )


def _measured(policy: Policy, parts: EngineParts) -> MeasuredRecipe | None:
    """What the policy cost, or else what its sharing and codec cost with all tokens kept."""
    by_policy: dict[Policy, MeasuredRecipe] = {}
    for recipe in parts.recipes:
        try:
            by_policy[parse_policy(recipe.policy, parts.menu)] = recipe
        except InvalidField:
            continue
    alone = Policy(sharing=policy.sharing, codec=policy.codec)
    return by_policy.get(policy) or by_policy.get(alone)

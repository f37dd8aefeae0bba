"""Whether the policies in a tenant's limits mean something to the models that are served."""

import asyncio
from collections.abc import Sequence

from kvcluster.engine.api import Backend, BackendStatus
from kvcluster.errors import InvalidField
from kvcluster.policy import Menu, parse_policy
from kvcluster.policy_bounds import parse_bound
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.types import Policy

_STATUS_TIMEOUT_S = 5.0


class PolicyTexts:
    """Reads policies as the engines behind `backends` would."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = tuple(backends)

    async def check(self, limits: TenantLimits) -> None:
        """While no engine answers, only the form was checked.

        Raises: InvalidField for a policy that no served model has on its menu.
        """
        if not limits.default_policy and not limits.allowed_policies:
            return
        answers = await asyncio.gather(*map(_status, self._backends), return_exceptions=True)
        menus = [answer.menu for answer in answers if isinstance(answer, BackendStatus)]
        if not menus:
            return
        _check("limits.default_policy", limits.default_policy, menus)
        for text in limits.allowed_policies:
            _check("limits.allowed_policies", text, menus)


async def _status(backend: Backend) -> BackendStatus:
    async with asyncio.timeout(_STATUS_TIMEOUT_S):
        return await backend.status()


def _check(field: str, text: str, menus: Sequence[Menu]) -> None:
    if text in ("", str(Policy())):
        return
    refused: InvalidField | None = None
    for menu in menus:
        try:
            if parse_bound(text) is None:
                parse_policy(text, menu)
        except InvalidField as error:
            refused = error
        else:
            return
    if refused is not None:
        raise InvalidField(field, refused.message.removeprefix("policy: ")) from refused

"""The retention policies that exist. Adding one is a file and a line here."""

from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.full import FullRetention

RETENTIONS: dict[str, RetentionPolicy] = {policy.name: policy for policy in (FullRetention(),)}

"""What `kvcluster tenants` does in the database itself, without a server."""

import getpass
from pathlib import Path

from kvcluster.errors import ConfigError
from kvcluster.router.tenant_records import key_to_proto, report_to_proto
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import OPERATORS, Act, ApiKey, KeyRole, check_id


def add_operator_key(database: Path, key_id: str) -> pb.CreateApiKeyResponse:
    """A new operator's key in the file, which is made if there is none. Raises: InvalidField,
    ConfigError, ResourceExists, StoreUnavailable."""
    secret = make_secret()
    key = ApiKey(
        tenant=OPERATORS,
        key=key_id or f"k{secret.uid}",
        uid=secret.uid,
        digest=secret.digest,
        role=KeyRole.OPERATOR,
    )
    check_id("--api-key-id", key.key)
    act = Act(principal=f"local:{getpass.getuser()}", method="bootstrap")
    store = SqliteTenantStore(database)
    try:
        made = store.add_key(key, act)
    finally:
        store.close()
    return pb.CreateApiKeyResponse(api_key=key_to_proto(made), secret=secret.text)


def check_audit_log(database: Path) -> pb.VerifyAuditLogResponse:
    """Raises: ConfigError, StoreUnavailable."""
    if not database.is_file():
        raise ConfigError(f"--database: there is no file {database}")
    store = SqliteTenantStore(database)
    try:
        return report_to_proto(store.check_audit())
    finally:
        store.close()

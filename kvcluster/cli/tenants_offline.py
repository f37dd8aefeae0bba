"""What `kvcluster tenants` does in the database itself, without a server."""

import getpass
import os
import time
from pathlib import Path

from kvcluster.errors import ConfigError
from kvcluster.router.tenant_records import key_to_proto, report_to_proto
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.tenancy.api_key import make_secret
from kvcluster.tenancy.root_key import read_root_key, with_variable
from kvcluster.tenancy.sqlite_root_key import adopt_root_key
from kvcluster.tenancy.sqlite_store import SqliteTenantStore
from kvcluster.tenancy.tenant import OPERATORS, Act, ApiKey, KeyRole, check_id


def add_operator_key(database: Path, key_id: str, root_key: str) -> pb.CreateApiKeyResponse:
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
    store = SqliteTenantStore(database, root_key=read_root_key(with_variable(root_key, os.environ)))
    try:
        made = store.add_key(key, act)
    finally:
        store.close()
    return pb.CreateApiKeyResponse(api_key=key_to_proto(made), secret=secret.text)


def check_audit_log(database: Path, root_key: str) -> pb.VerifyAuditLogResponse:
    """Raises: ConfigError, StoreUnavailable."""
    _check_there(database)
    store = SqliteTenantStore(database, root_key=read_root_key(with_variable(root_key, os.environ)))
    try:
        return report_to_proto(store.check_audit())
    finally:
        store.close()


def adopt(database: Path, root_key: str) -> pb.VerifyAuditLogResponse:
    """What a check of the audit log says once it is signed. Raises: ConfigError,
    StoreUnavailable."""
    _check_there(database)
    read = read_root_key(with_variable(root_key, os.environ))
    if read is None:
        raise ConfigError("--root-key: want a file or env:NAME")
    act = Act(principal=f"local:{getpass.getuser()}", method="adopt-root-key")
    adopt_root_key(database, read, act, now=time.time())
    return check_audit_log(database, root_key)


def _check_there(database: Path) -> None:
    if not database.is_file():
        raise ConfigError(f"--database: there is no file {database}")

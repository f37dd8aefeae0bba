"""Serves language-model requests whose KV cache is sharded over many workers."""

from typing import TYPE_CHECKING

from kvcluster.config import ClusterConfig
from kvcluster.errors import (
    AccessError,
    AdmissionError,
    CalibrationMismatch,
    ClientTooSlow,
    ClusterOverloaded,
    ConfigError,
    ContextNotFound,
    ContextNotReady,
    ContextTooLong,
    CredentialInvalid,
    DeadlineExceeded,
    DeadlineInfeasible,
    Draining,
    EtagMismatch,
    GenerationNotFound,
    InvalidField,
    KvClusterError,
    MalformedMessage,
    MessageTooLarge,
    ModelError,
    ModelNotFound,
    ModelUnsupported,
    PermissionDenied,
    PolicyUnsupported,
    PromptCorrupt,
    QuotaExceeded,
    RankLost,
    RequestError,
    RequestIdConflict,
    ResourceExists,
    ResourceNotFound,
    ResumeExpired,
    SavedCacheMismatch,
    SealedCacheDamaged,
    SealedCacheErased,
    SealedCacheUnknown,
    ServerUnavailable,
    SpillDiskFull,
    SpillError,
    SpillUnavailable,
    StateConflict,
    StoreUnavailable,
    TenantDraining,
    TenantSuspended,
    UploadStalled,
)

if TYPE_CHECKING:
    from kvcluster.client import Client

__all__ = [
    "AccessError",
    "AdmissionError",
    "CalibrationMismatch",
    "Client",
    "ClientTooSlow",
    "ClusterConfig",
    "ClusterOverloaded",
    "ConfigError",
    "ContextNotFound",
    "ContextNotReady",
    "ContextTooLong",
    "CredentialInvalid",
    "DeadlineExceeded",
    "DeadlineInfeasible",
    "Draining",
    "EtagMismatch",
    "GenerationNotFound",
    "InvalidField",
    "KvClusterError",
    "MalformedMessage",
    "MessageTooLarge",
    "ModelError",
    "ModelNotFound",
    "ModelUnsupported",
    "PermissionDenied",
    "PolicyUnsupported",
    "PromptCorrupt",
    "QuotaExceeded",
    "RankLost",
    "RequestError",
    "RequestIdConflict",
    "ResourceExists",
    "ResourceNotFound",
    "ResumeExpired",
    "SavedCacheMismatch",
    "SealedCacheDamaged",
    "SealedCacheErased",
    "SealedCacheUnknown",
    "ServerUnavailable",
    "SpillDiskFull",
    "SpillError",
    "SpillUnavailable",
    "StateConflict",
    "StoreUnavailable",
    "TenantDraining",
    "TenantSuspended",
    "UploadStalled",
]


def __getattr__(name: str) -> object:
    # Workers import this package too, and have no use for grpc.
    if name == "Client":
        from kvcluster.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

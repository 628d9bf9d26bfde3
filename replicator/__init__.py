"""Replicates SQLite databases to object storage, continuously, and restores them to any moment. The package's public names.

Owns the list of what other programs may import. Each name is loaded at its first use, so that ``replicator --help`` loads none.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replicator import catalogue as catalogue
    from replicator.capture import CaptureSettings as CaptureSettings
    from replicator.config import Config as Config
    from replicator.config import load_config as load_config
    from replicator.descriptors import raise_descriptor_limit as raise_descriptor_limit
    from replicator.diff import Difference as Difference
    from replicator.diff import RowChange as RowChange
    from replicator.diff import SchemaChange as SchemaChange
    from replicator.durable import fsync_dir as fsync_dir
    from replicator.durable import write_file as write_file
    from replicator.errors import BucketMissing as BucketMissing
    from replicator.errors import ChainBroken as ChainBroken
    from replicator.errors import ConfigError as ConfigError
    from replicator.errors import DaemonNotRunning as DaemonNotRunning
    from replicator.errors import DatabaseError as DatabaseError
    from replicator.errors import DatabaseMissing as DatabaseMissing
    from replicator.errors import DatabaseNotReplicable as DatabaseNotReplicable
    from replicator.errors import FormatError as FormatError
    from replicator.errors import IdentityMissing as IdentityMissing
    from replicator.errors import IntegrityCheckFailed as IntegrityCheckFailed
    from replicator.errors import LeaseHeld as LeaseHeld
    from replicator.errors import LeaseLost as LeaseLost
    from replicator.errors import NotEncrypted as NotEncrypted
    from replicator.errors import NothingToRestore as NothingToRestore
    from replicator.errors import ObjectMissing as ObjectMissing
    from replicator.errors import PastIsReadOnly as PastIsReadOnly
    from replicator.errors import PreconditionFailed as PreconditionFailed
    from replicator.errors import QueryFailed as QueryFailed
    from replicator.errors import ReplicatorError as ReplicatorError
    from replicator.errors import RestoreError as RestoreError
    from replicator.errors import SealDamaged as SealDamaged
    from replicator.errors import StateMismatch as StateMismatch
    from replicator.errors import StoreDenied as StoreDenied
    from replicator.errors import StoreError as StoreError
    from replicator.errors import StoreUnavailable as StoreUnavailable
    from replicator.errors import SyncTimeout as SyncTimeout
    from replicator.errors import TargetExists as TargetExists
    from replicator.errors import UsageError as UsageError
    from replicator.follow import Followed as Followed
    from replicator.follow import Follower as Follower
    from replicator.lease import Lease as Lease
    from replicator.lease import LeaseRecord as LeaseRecord
    from replicator.metrics import Collector as Collector
    from replicator.past import Past as Past
    from replicator.past import open_past as open_past
    from replicator.proof import Verdict as Verdict
    from replicator.proof import verify as verify
    from replicator.replica import Replica as Replica
    from replicator.restore import RestoreReport as RestoreReport
    from replicator.restore import plan_restore as plan_restore
    from replicator.restore import restore as restore
    from replicator.restore_plan import RestoreOptions as RestoreOptions
    from replicator.restore_plan import RestorePlan as RestorePlan
    from replicator.restored import mark_restored as mark_restored
    from replicator.service import NotDurable as NotDurable
    from replicator.service import Replicator as Replicator
    from replicator.service import default_state as default_state
    from replicator.signals import heard as heard
    from replicator.store import ObjectInfo as ObjectInfo
    from replicator.store import ObjectStore as ObjectStore
    from replicator.store import open_store as open_store
    from replicator.store.measure import Meter as Meter
    from replicator.store.seal import sealed as sealed
    from replicator.trials import TrialRecord as TrialRecord
    from replicator.upkeep import UpkeepSettings as UpkeepSettings
    from replicator.values import Position as Position
    from replicator.values import Timeline as Timeline
    from replicator.values import printable as printable
    from replicator.watch import Folder as Folder
    from replicator.worker import DatabaseStatus as DatabaseStatus
    from replicator.worker import Protection as Protection
    from replicator.worker import WorkerSettings as WorkerSettings

__version__ = "0.1.0"

_HOMES = {
    "capture": "CaptureSettings",
    "config": "Config load_config",
    "descriptors": "raise_descriptor_limit",
    "diff": "Difference RowChange SchemaChange",
    "durable": "fsync_dir write_file",
    "errors": (
        "BucketMissing ChainBroken ConfigError DaemonNotRunning DatabaseError DatabaseMissing "
        "DatabaseNotReplicable FormatError IdentityMissing IntegrityCheckFailed LeaseHeld LeaseLost NotEncrypted NothingToRestore "
        "ObjectMissing PastIsReadOnly PreconditionFailed QueryFailed ReplicatorError RestoreError SealDamaged StateMismatch "
        "StoreDenied StoreError "
        "StoreUnavailable SyncTimeout TargetExists UsageError"
    ),
    "follow": "Followed Follower",
    "lease": "Lease LeaseRecord",
    "metrics": "Collector",
    "past": "Past open_past",
    "proof": "Verdict verify",
    "replica": "Replica",
    "restore": "RestoreReport plan_restore restore",
    "restore_plan": "RestoreOptions RestorePlan",
    "restored": "mark_restored",
    "service": "NotDurable Replicator default_state",
    "signals": "heard",
    "store": "ObjectInfo ObjectStore open_store",
    "store.measure": "Meter",
    "store.seal": "sealed",
    "upkeep": "UpkeepSettings",
    "trials": "TrialRecord",
    "values": "Position Timeline printable",
    "watch": "Folder",
    "worker": "DatabaseStatus Protection WorkerSettings",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = ["__version__", "catalogue", *_HOME_OF]


class _Package(ModuleType):
    """The package itself. ``restore`` is a function here, and a module of the same name must not take its place when it is loaded."""

    def __getattr__(self, name: str) -> Any:
        if name == "catalogue":
            return importlib.import_module(f"{__name__}.catalogue")
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

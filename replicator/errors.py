"""Every way in which the replicator fails: one failure, one class, one message, one exit code.

Owns the exception tree. Foreign exceptions are translated to these at the adapter that met them, ``raise … from``.
A message says what failed, which thing it was, and what to do next, on one line.
"""

from __future__ import annotations


class ReplicatorError(Exception):
    """Base of all of them. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(ReplicatorError):
    """The caller asked for something that has no meaning: a malformed time, URL or option."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration file is wrong; the message begins with ``file:line:`` and names the key."""


# -- object storage ----------------------------------------------------------------------------------------------------


class StoreError(ReplicatorError):
    """Object storage did not do what was asked."""


class StoreUnavailable(StoreError):
    """It cannot be reached, is overloaded or failed inside; the same request may succeed later."""


class StoreDenied(StoreError):
    """It refused the credentials or the permission; trying again does not help until a person acts."""


class BucketMissing(StoreError):
    """The bucket does not exist."""


class ObjectMissing(StoreError):
    """No object has this key."""


class PreconditionFailed(StoreError):
    """A conditional write lost: the object exists already (if_none_match), or has changed (if_match)."""


class IdentityMissing(StoreError):
    """An object is encrypted, and none of the identities at hand opens it."""


class NotEncrypted(StoreError):
    """An object is readable by anybody where everything is to be encrypted."""


# -- bytes that are not what they should be ----------------------------------------------------------------------------


class FormatError(ReplicatorError):
    """Bytes do not follow the format that they claim to have."""


class SegmentDamaged(FormatError):
    """A segment is truncated, or a checksum in it does not match."""


class SegmentVersionUnknown(FormatError):
    """The segment was written by a newer release than this one can read."""


class SealDamaged(SegmentDamaged, StoreError):
    """An encrypted object, most often a segment, is truncated or altered, or is stored under the name of another one."""


class SealVersionUnknown(SegmentVersionUnknown, StoreError):
    """It was written by a newer release than this one can read."""


class LtxDamaged(FormatError):
    """A file of a Litestream replica is truncated, or a checksum in it does not match."""


class WalHeaderDamaged(FormatError):
    """The 32 bytes at the start of a WAL are not a valid WAL header."""


class LocalStateDamaged(FormatError):
    """A file in the replicator's own state directory is damaged; it is set aside and a new base is taken."""


class LocalStateUnwritable(ReplicatorError):
    """The disk refused a write to the replicator's own state directory; the same write is tried again."""


# -- restore -----------------------------------------------------------------------------------------------------------


class RestoreError(ReplicatorError):
    """A restore cannot be done as asked; nothing was written at the target."""


class NothingToRestore(RestoreError):
    """The replica holds nothing at, or before, what was asked for."""


class ChainBroken(RestoreError):
    """A segment that the restore needs is missing, or does not follow from the one before it."""


class StateMismatch(RestoreError):
    """The pages put together do not have the state checksum that was recorded; the result was thrown away."""


class NoRoom(RestoreError):
    """The file system of the target has not enough room for the database; what was downloaded before stays."""


class TargetExists(RestoreError):
    """There is a file at the target already."""


class IntegrityCheckFailed(RestoreError):
    """The database was replicated and restored page for page, but SQLite finds it damaged: it was so at its source."""


class QueryFailed(ReplicatorError):
    """SQLite cannot do what a statement on an image of the past asks for."""


class PastIsReadOnly(QueryFailed):
    """A statement would write to an image of the past, or to a file."""


# -- live databases ----------------------------------------------------------------------------------------------------


class DatabaseError(ReplicatorError):
    """A live database cannot be replicated now."""


class DatabaseMissing(DatabaseError):
    """There is no file at the path."""


class NotADatabase(DatabaseError):
    """The file is not an SQLite database."""


class DatabaseBusy(DatabaseError):
    """A lock could not be had in time; the next step tries again."""


class DatabaseNotReplicable(DatabaseError):
    """The database is used in a way that no replication can follow: an exclusive lock, a file system without locks."""


class SyncTimeout(ReplicatorError):
    """What was committed before the call did not become durable in the time that was given."""


class LeaseHeld(ReplicatorError):
    """Another has the right to write, and is alive."""


class LeaseLost(ReplicatorError):
    """This process had the right to write, and another has it now. It must not write any more."""


class DaemonNotRunning(ReplicatorError):
    """No ``replicator replicate`` answers at the control socket."""

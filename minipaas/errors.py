"""Every way in which the platform fails: one failure, one class, one message, one exit code, one HTTP status.

Owns the exception tree. Foreign exceptions are translated to these at the adapter that met them, ``raise … from``.
Exit codes: 1 refused or failed, 2 usage or preflight, 3 partly done and resumable, 4 auth, 5 time-out, 6 another node has the fleet,
130 interrupted.
"""

from __future__ import annotations


class PlatformError(Exception):
    """Base of all of them. The message says what failed, which thing it was and what to do next, on one line."""

    exit_code = 1
    http_status = 500


class BadRequest(PlatformError):
    exit_code = 2
    http_status = 400


class BadName(BadRequest):
    """A name breaks the rule of minipaas.model.check_name."""


class ManifestError(BadRequest):
    """minipaas.toml is wrong; the message begins with ``file:line:`` and names the key."""


class NotAuthorised(PlatformError):
    exit_code = 4
    http_status = 401


class Forbidden(NotAuthorised):
    """The token is valid, but does not give the right to do this."""

    http_status = 403


class NotFound(PlatformError):
    http_status = 404


class Conflict(PlatformError):
    """The thing is there already, or in a state that does not allow this."""

    http_status = 409


class NodeNotEmpty(Conflict):
    """Setup and recovery need an empty data directory, and this one holds something."""

    exit_code = 2


class WrongRecoveryKey(PlatformError):
    exit_code = 4
    http_status = 403


class FleetHeld(Conflict):
    """Another node holds the bucket, or has had it since: this one must not go on. The systemd unit does not start it again."""

    exit_code = 6


class Unavailable(PlatformError):
    """The server cannot be reached, or a part of it is down."""

    http_status = 503


class TimedOut(PlatformError):
    exit_code = 5
    http_status = 504


class Interrupted(PlatformError):
    """The user ended a command while the node may have been carrying it out; the message says where to look."""

    exit_code = 130


class TooMuch(PlatformError):
    """What was sent is larger than the limit."""

    http_status = 413


class TooManyClients(PlatformError):
    """As many clients as there may be follow logs, events or deploys already."""

    http_status = 429


# -- this node ---------------------------------------------------------------------------------------------------------


class StateUnavailable(Unavailable):
    """The state database cannot be read or written now: the disk is full or failing."""


class StateTooNew(PlatformError):
    """The state database was written by a newer release of minipaas."""

    exit_code = 2


class AlreadyRunning(Conflict):
    """Another ``minipaas serve`` works on this data directory."""

    exit_code = 2


class SealBroken(PlatformError):
    """A sealed secret cannot be opened with this node's key."""


class VolumeGone(Unavailable):
    """The directory of a volume that held data is not there; it is never made anew, since that would hide the loss."""


class DeployFailed(PlatformError):
    """The new release did not become healthy; the message says why, and whether the old one serves."""

    http_status = 422


# -- engine ------------------------------------------------------------------------------------------------------------


class EngineError(PlatformError):
    """The container engine did not do what was asked."""


class EngineMissing(EngineError):
    """Neither Docker nor Podman was found; the message says how to install one."""

    exit_code = 2
    http_status = 503


class EngineUnavailable(EngineError):
    """The engine is there but does not answer."""

    http_status = 503


class ImageMissing(EngineError):
    http_status = 404


class ImageRefused(EngineError):
    """An image tarball is truncated, for another architecture, or unsafe; the message says which."""

    http_status = 400


class BuildFailed(EngineError):
    """The build exited with an error; ``log`` holds its last lines."""

    http_status = 422

    def __init__(self, message: str, log: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.log = log


class ContainerMissing(EngineError):
    http_status = 404


# -- edge --------------------------------------------------------------------------------------------------------------


class EdgeError(PlatformError):
    """Caddy did not start, or refused a configuration."""

    http_status = 503

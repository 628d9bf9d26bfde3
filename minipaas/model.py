"""The things the platform is made of: values only, no I/O.

Owns App, Release, Machine, Volume, Node and the rule for names. Times are UTC milliseconds since 1970.
"""

from __future__ import annotations

import re
import secrets
from enum import StrEnum

import msgspec

from minipaas.errors import BadName

RESERVED_NAMES = frozenset({"internal", "flycast", "www", "api", "admin", "localhost"})
MAX_DOMAIN = 253 - 64
"""Characters: the name of an app and a dot go before it."""
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")


def check_name(name: str, what: str = "app") -> str:
    """The name itself, if users may give it. Raises BadName. The one rule for names from users."""
    if not _NAME.fullmatch(name) or "--" in name:
        raise BadName(
            f"{name!r} is not a name for {what}: use lower-case letters, digits and single hyphens, "
            "starting with a letter, at most 63 characters"
        )
    if name in RESERVED_NAMES:
        raise BadName(f"{name!r} is reserved; choose another name for {what}")
    return name


def check_domain(domain: str) -> str:
    """The domain itself, if apps may be named below it: ASCII, lower case, no scheme, port, path or dot at the end. Raises BadName."""
    if _is_domain(domain):
        return domain
    near = _plain_domain(domain)
    hint = f"did you mean {near}?" if _is_domain(near) else "write a bare name such as apps.example.com"
    raise BadName(f"{domain!r} is not a domain for apps; {hint}")


def _is_domain(text: str) -> bool:
    labels = text.split(".")
    return len(text) <= MAX_DOMAIN and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdecimal()


def _plain_domain(text: str) -> str:
    """What was probably meant."""
    host = text.strip().partition("://")[2] or text.strip()
    host = re.split("[/:?#]", host)[0].strip(".").lower()
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def new_machine_id() -> str:
    """14 hex digits, as fly's."""
    return secrets.token_hex(7)


def new_volume_id() -> str:
    return f"vol_{secrets.token_hex(8)}"


class ReleaseStatus(StrEnum):
    DEPLOYING = "deploying"
    LIVE = "live"
    FAILED = "failed"
    SUPERSEDED = "superseded"


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """id: 16 hex digits, made once per data directory. recipient: the node's age public key."""

    id: str
    name: str
    region: str
    recipient: str
    joined_ms: int


class App(msgspec.Struct, frozen=True, kw_only=True):
    """destroyed_ms: set by destroy; the data is kept until purge_after_ms."""

    name: str
    created_ms: int
    destroyed_ms: int | None = None
    purge_after_ms: int | None = None


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """number: from 1, per app. image: reference that the engine knows. image_digest: manifest of it in the bucket ('' until it
    is there). config: the manifest that was deployed, as JSON text. message: for a failed one, why, in words a user can act on.
    """

    app: str
    number: int
    image: str
    image_digest: str
    config: str
    created_ms: int
    status: ReleaseStatus
    message: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A container that should be there. desired: 'started' or 'stopped'. restarts: grows when the user asks for a restart."""

    id: str
    app: str
    release: int
    group: str
    node: str
    desired: str = "started"
    restarts: int = 0


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """One directory on one node, mounted into machines of one app.

    state: 'creating' (its directory was never made), 'created', or 'restoring' (from the bucket, before anything uses it).
    """

    id: str
    app: str
    name: str
    node: str
    created_ms: int
    state: str = "creating"
    destroyed_ms: int | None = None
    purge_after_ms: int | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the journal. app: '' when it concerns the node."""

    at_ms: int
    app: str
    text: str


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A bearer token: only the SHA-256 of it is known. abilities: names of actions, or ('*',)."""

    name: str
    sha256: str
    abilities: tuple[str, ...]
    created_ms: int


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """id: 32 hex digits, the same in the bucket's fleet.json. recovery_recipient: the public half of the recovery key."""

    id: str
    recovery_recipient: str

"""Who may do what: tokens, principals, and the one authorisation function.

Owns the list of actions. Every method of ``service.Platform`` and every route passes ``authorise``. Keeps only hashes of tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from minipaas.errors import Forbidden, NotAuthorised, NotFound
from minipaas.model import Token
from minipaas.settings import write_private
from minipaas.state import State

EVERYTHING = "*"
LOCAL_TOKEN = "owner"


class Action(StrEnum):
    """What a token may give the right to."""

    READ = "read"
    LOGS = "logs"
    CREATE = "create"
    DEPLOY = "deploy"
    RESTART = "restart"
    SECRETS = "secrets"
    DESTROY = "destroy"


@dataclass(frozen=True)
class Principal:
    """Who asks. name: of the token, for words to others. abilities: actions, or ('*',) for all."""

    name: str
    abilities: tuple[str, ...] = (EVERYTHING,)


def authorise(principal: Principal, action: Action, app: str = "") -> None:
    """Raises Forbidden. app: the one that it is about, '' for the node; every ability holds for all apps so far."""
    if EVERYTHING not in principal.abilities and action not in principal.abilities:
        what = f"{action} {app}".strip()
        raise Forbidden(
            f"the token {principal.name!r} does not give the right to: {what}; ask the owner for one that does"
        )


def authenticate(tokens: Sequence[Token], header: str) -> Principal:
    """The principal of an ``Authorization: Bearer …`` header. Raises NotAuthorised. Takes as long for every wrong token."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "bearer" or not value.strip():
        raise NotAuthorised("a token is needed: Authorization: Bearer TOKEN (minipaas setup showed it once)")
    given = token_hash(value.strip())
    found = [token for token in tokens if hmac.compare_digest(token.sha256, given)]
    if not found:
        raise NotAuthorised("this token is not known here; check it, or use the one in the node's data directory")
    return Principal(found[0].name, found[0].abilities)


def new_token() -> str:
    """256 random bits, so that its plain SHA-256 can be kept."""
    return f"mp_{secrets.token_urlsafe(32)}"


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def token_path(data_dir: Path) -> Path:
    """The owner's token, for commands on the same host (mode 0600)."""
    return data_dir / "token"


def issue_local_token(state: State, data_dir: Path, now_ms: int, node: str) -> str:
    """A new token for the owner of the host, in DATA/token; the one before of this node is worth nothing any more.

    Those of other nodes stay good: what people and programs were given before a recovery works after it.
    """
    token = new_token()
    state.replace_token(
        Token(name=f"{LOCAL_TOKEN} of {node}", sha256=token_hash(token), abilities=(EVERYTHING,), created_ms=now_ms)
    )
    write_private(token_path(data_dir), token + "\n")
    return token


def read_local_token(data_dir: Path) -> str:
    try:
        return token_path(data_dir).read_text().strip()
    except FileNotFoundError:
        raise NotFound(f"{token_path(data_dir)} is missing; give the token that minipaas setup showed") from None

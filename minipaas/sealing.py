"""Sealed secrets: age encryption to this node and to the recovery key that the owner holds.

Owns the node's identity file. The private half of the recovery key passes through once, at setup or recovery, and is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyrage

from minipaas.errors import BadRequest, Conflict, NotFound, SealBroken, WrongRecoveryKey
from minipaas.settings import write_private

_PREFIX = "AGE-SECRET-KEY-1"


@dataclass(frozen=True)
class Identity:
    """An age key pair. secret: ``AGE-SECRET-KEY-1…``, does not print. recipient: ``age1…``, the public half."""

    secret: str = field(repr=False)
    recipient: str

    @classmethod
    def generate(cls) -> Identity:
        pair = pyrage.x25519.Identity.generate()
        return cls(str(pair), str(pair.to_public()))

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Raises WrongRecoveryKey when the text is not an age identity; the message never repeats it."""
        try:
            pair = pyrage.x25519.Identity.from_str(text.strip().upper())
        except pyrage.IdentityError as error:
            raise WrongRecoveryKey(
                f"this is not a recovery key; one begins with {_PREFIX} and has 74 characters"
            ) from error
        return cls(str(pair), str(pair.to_public()))


def seal(text: str, recipients: Sequence[str]) -> bytes:
    """``text`` encrypted so that each of the recipients can open it alone. Raises BadRequest for a malformed recipient."""
    try:
        keys = [pyrage.x25519.Recipient.from_str(recipient) for recipient in recipients]
    except pyrage.RecipientError as error:
        raise BadRequest(f"a recipient is not an age public key: {error}") from error
    sealed: bytes = pyrage.encrypt(text.encode(), keys)
    return sealed


def unseal(sealed: bytes, identity: Identity) -> str:
    """Raises SealBroken when it was not sealed to this identity, or is damaged."""
    try:
        text: bytes = pyrage.decrypt(sealed, [pyrage.x25519.Identity.from_str(identity.secret)])
    except pyrage.DecryptError as error:
        raise SealBroken("a secret cannot be opened with this node's key; set it again, or recover the node") from error
    return text.decode()


@dataclass(frozen=True)
class Sealer:
    """Seals to this node and to the recovery key; opens with the node's identity."""

    node: Identity
    recovery_recipient: str

    def seal(self, text: str) -> bytes:
        return seal(text, (self.node.recipient, self.recovery_recipient))

    def unseal(self, sealed: bytes) -> str:
        return unseal(sealed, self.node)


def create_node_identity(path: Path) -> Identity:
    """Raises Conflict when there is one: it may be the only thing that opens the secrets."""
    if path.exists():
        raise Conflict(f"{path} exists already; it is not overwritten")
    identity = Identity.generate()
    write_private(path, identity.secret + "\n")
    return identity


def read_node_identity(path: Path) -> Identity:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise NotFound(
            f"{path} is missing; without it no secret can be opened: recover the node on an empty directory"
        ) from None
    try:
        return Identity.parse(text)
    except WrongRecoveryKey as error:
        raise SealBroken(f"{path} is damaged; recover the node on an empty directory") from error

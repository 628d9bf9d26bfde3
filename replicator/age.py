"""Keys of age: recipients that can be shown to anybody, identities that open what was encrypted to them.

Owns their text forms, and the wrapping of an object's key to them. An identity is in no message and in no ``repr``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyrage

from replicator.envelope import MAX_RECIPIENTS
from replicator.errors import UsageError

IDENTITY_VARIABLE = "REPLICATOR_AGE_IDENTITY"
_MAX_FILE_BYTES = 1 << 16


class NoMatch(Exception):
    """None of the identities opens a wrapped key."""


@dataclass(frozen=True)
class Keys:
    """recipients: that new objects are encrypted to, none to read only. identities: that open objects."""

    recipients: tuple[Any, ...]
    identities: tuple[Any, ...] = field(repr=False)

    @classmethod
    def parse(cls, recipients: Sequence[str], identities: Sequence[str]) -> Keys:
        """recipients: ``age1…``. identities: ``AGE-SECRET-KEY-1…``. Raises UsageError, without the text of an identity."""
        keys = cls(tuple(map(_recipient, recipients)), tuple(map(_identity, identities)))
        if not identities:
            raise UsageError("encryption needs an age identity: whoever writes a replica also reads it back")
        if len(recipients) > MAX_RECIPIENTS:
            raise UsageError(f"there are {len(recipients)} age recipients; at most {MAX_RECIPIENTS} are possible")
        own = {str(identity.to_public()) for identity in keys.identities}
        if recipients and own.isdisjoint(map(str, keys.recipients)):
            raise UsageError(
                f"no age identity belongs to one of the recipients, so that what is written could not be read back; add the recipient "
                f"{min(own)}"
            )
        return keys

    def wrap(self, secret: bytes) -> bytes:
        """A file of age that each recipient can open."""
        wrapped: bytes = pyrage.encrypt(secret, self.recipients)
        return wrapped

    def unwrap(self, wrapped: bytes) -> bytes:
        """Raises NoMatch."""
        try:
            secret: bytes = pyrage.decrypt(wrapped, self.identities)
        except pyrage.DecryptError as error:
            raise NoMatch from error
        return secret


def identities_in(text: str, name: str) -> tuple[str, ...]:
    """The identities in a file as age-keygen writes it: one a line, with empty lines and comments. Raises UsageError with ``name``."""
    lines = [line.strip() for line in text.splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise UsageError(f"{name} holds no age identity; make one with age-keygen")
    try:
        for line in found:
            _identity(line)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    return found


def read_identities(file: Path) -> tuple[str, ...]:
    """Raises UsageError."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_FILE_BYTES).decode()
    except OSError as error:
        raise UsageError(f"the identity file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"the identity file {file} is not text; is it encrypted with a passphrase?") from None
    return identities_in(text, str(file))


def given_identities(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Those in the file that was named, else in REPLICATOR_AGE_IDENTITY; none without both. Raises UsageError."""
    if file is not None:
        return read_identities(file)
    text = environment.get(IDENTITY_VARIABLE, "")
    return identities_in(text, IDENTITY_VARIABLE) if text else ()


def check_recipient(text: str) -> None:
    """Raises UsageError."""
    _recipient(text)


def check_identity(text: str) -> None:
    """Raises UsageError, without the text."""
    _identity(text)


def _recipient(text: str) -> Any:
    try:
        return pyrage.x25519.Recipient.from_str(text.strip())
    except pyrage.RecipientError:
        if text.strip().upper().startswith("AGE-SECRET-KEY-"):
            raise UsageError(
                "an age identity, which is secret, is given as a recipient; give its public half"
            ) from None
        raise UsageError(f"{text!r} is not an age recipient; one begins with age1 and has 62 characters") from None


def _identity(text: str) -> Any:
    try:
        return pyrage.x25519.Identity.from_str(text.strip().upper())
    except pyrage.IdentityError:
        raise UsageError(
            "this is not an age identity; one begins with AGE-SECRET-KEY-1 and has 74 characters"
        ) from None

"""The form of a sealed object: its head, and which bytes of it hold which bytes of the content. Pure.

Owns docs/format.md, section 7, but for the ciphers. It sees no key and no content.
"""

from __future__ import annotations

import struct

import xxhash

from replicator.errors import IdentityMissing, SealDamaged, SealVersionUnknown

MAGIC = b"\x89SEAL\r\n\x1a"
VERSION = 1
HEAD_SIZE = 1024
CHUNK_SIZE = 65536
TAG_SIZE = 16
SEALED_CHUNK_SIZE = CHUNK_SIZE + TAG_SIZE
BOUND = struct.pack("<8sHHI", MAGIC, VERSION, 0, CHUNK_SIZE)
"""The first bytes of the head, which are bound to every chunk."""

MAX_RECIPIENTS = 6
"""What age makes of seven may not fit into the head."""

_FIXED = struct.Struct("<8sHHII")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = HEAD_SIZE - _CHECKSUM.size
_MAX_WRAPPED = _CHECKSUM_AT - _FIXED.size


def encode_head(wrapped_key: bytes) -> bytes:
    """wrapped_key: a file of age, for at most MAX_RECIPIENTS. Source: docs/format.md, section 7.1."""
    if not 1 <= len(wrapped_key) <= _MAX_WRAPPED:
        raise ValueError(f"a wrapped key of {len(wrapped_key)} bytes does not fit into the head")
    filled = (_FIXED.pack(MAGIC, VERSION, 0, CHUNK_SIZE, len(wrapped_key)) + wrapped_key).ljust(_CHECKSUM_AT, b"\0")
    return filled + _checksum(filled)


def is_sealed(start: bytes) -> bool:
    """start: the first HEAD_SIZE bytes of an object, or all of a shorter one. True for a damaged head, too."""
    return start.startswith(MAGIC) or _has_checksum(start)


def wrapped_key(head: bytes, name: str) -> bytes:
    """The wrapped key in the head of a sealed object. Raises SealDamaged, SealVersionUnknown, naming the object."""
    if not head.startswith(MAGIC) or not _has_checksum(head):
        raise damaged(name, "its head is truncated or altered")
    _, version, reserved, chunk_size, length = _FIXED.unpack_from(head)
    if version > VERSION:
        raise SealVersionUnknown(
            f"{name} is encrypted in version {version}, this release reads up to {VERSION}; use a newer one"
        )
    padding = head[_FIXED.size + length : _CHECKSUM_AT]
    if (version, reserved, chunk_size) != (VERSION, 0, CHUNK_SIZE) or not 1 <= length <= _MAX_WRAPPED or any(padding):
        raise damaged(name, "its head has an impossible value")
    return head[_FIXED.size : _FIXED.size + length]


def sealed_size(content_bytes: int) -> int:
    """What an object takes whose content has so many bytes."""
    return HEAD_SIZE + content_bytes + TAG_SIZE * max(1, -(-content_bytes // CHUNK_SIZE))


def content_size(sealed_bytes: int) -> int:
    """The inverse; 0 for a size that no sealed object has."""
    body = max(0, sealed_bytes - HEAD_SIZE)
    return max(0, body - TAG_SIZE * -(-body // SEALED_CHUNK_SIZE))


def damaged(name: str, what: str) -> SealDamaged:
    return SealDamaged(f"{name} is encrypted and damaged: {what}")


def refuse_sealed(body: bytes, name: str) -> None:
    """Where a content is expected as it is. Raises IdentityMissing when it is sealed."""
    if is_sealed(body[:HEAD_SIZE]):
        raise IdentityMissing(
            f"{name} is encrypted; give an age identity that opens it: --identity FILE, REPLICATOR_AGE_IDENTITY, or the "
            "key `age` in the configuration"
        )


def _has_checksum(head: bytes) -> bool:
    return len(head) == HEAD_SIZE and head.endswith(_checksum(head))


def _checksum(head: bytes) -> bytes:
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head[len(MAGIC) : _CHECKSUM_AT]))

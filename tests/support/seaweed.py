"""The real S3 server of the tests. Owns nothing of its own: it is the one of the demo."""

from __future__ import annotations

from demo.seaweed import Ports, SeaweedError, SeaweedServer

__all__ = ["Ports", "SeaweedError", "SeaweedServer"]

"""Which ArviZ is installed: 1.0 was a rewrite with other names, signs and containers."""

from __future__ import annotations

from importlib import metadata


def before_arviz_one() -> bool:
    """Whether the installed ArviZ is older than 1.0."""
    return int(metadata.version("arviz").split(".")[0]) < 1

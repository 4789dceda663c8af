"""Makes sure that gRPC is there, and quiet, before anything imports it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys

from edgert.errors import ConfigError

REQUIREMENTS = ("grpcio>=1.85.1,<2", "grpcio-health-checking>=1.85.1,<2")

# Read by gRPC's C core when it is loaded: no lines of its own on stderr, no handlers around fork.
_SETTINGS = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}


def require_grpc() -> None:
    """Set up gRPC for its first import, unless the environment says otherwise.

    Raises:
        ConfigError: it is not installed; the hint is the command that does.
    """
    missing = [n for n in ("grpc", "grpc_health") if importlib.util.find_spec(n) is None]
    if missing:
        command = shlex.join([sys.executable, "-m", "pip", "install", *REQUIREMENTS])
        raise ConfigError("hosts are reached over gRPC, which is not installed", hint=command)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)

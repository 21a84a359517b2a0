"""Ports that nobody else takes."""

from __future__ import annotations

import itertools
import os
import socket

# Below the kernel's own range and above that of Ray's workers; a range for each process that runs tests.
PORTS = itertools.count(21_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")

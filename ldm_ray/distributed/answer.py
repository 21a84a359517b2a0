"""Whether anything answers where a Ray cluster is to be: Ray itself waits for minutes where nothing does."""

from __future__ import annotations

import os
import socket

WAIT_S = 5.0
# The first bytes of an HTTP/2 connection (RFC 9113, 3.4) with empty settings, which gRPC answers with its own settings
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = 4


def check_answer(address: str) -> None:
    """Raises an Exception that says what is wrong, within seconds, unless a Ray answers that takes this one's token.

    address: as RAY_ADDRESS has it: ``host:port``, ``ray://host:port`` or ``auto``.
    """
    host, port = place_of(address)
    try:
        connection = socket.create_connection((host, port), WAIT_S)
    except socket.gaierror:
        raise ConnectionError(f"the host name {host} is not known here") from None
    except TimeoutError:
        raise ConnectionError(f"{host}, port {port}, did not answer within {WAIT_S:.0f} s") from None
    except OSError as error:
        raise ConnectionError(f"{host}, port {port}: {error.strerror or error}") from None
    with connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return  # what answers speaks TLS first
        try:
            connection.sendall(HELLO)
            answer = connection.recv(9)
        except OSError:
            answer = b""
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise ConnectionError(f"what listens at {host}, port {port}, is no Ray")
    # For "auto" ray.init finds the token first; Ray's client tries for half a minute at the most
    if address != "auto" and not address.startswith("ray://"):
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        GcsClient(address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def place_of(address: str) -> tuple[str, int]:
    """(host, port) of an address. ConnectionError for ``auto`` where no Ray runs, ValueError for what is no address."""
    wrong = ValueError("an address is host:port, such as 10.0.0.1:6379, ray://host:10001, or auto")
    kind, mark, place = address.rpartition("://")
    if mark and kind != "ray":
        raise wrong
    if not mark:
        from ray._private.services import canonicalize_bootstrap_address_or_die

        try:
            place = canonicalize_bootstrap_address_or_die(address)
        except ConnectionError:
            raise ConnectionError("no Ray runs on this machine") from None
        except ValueError:
            raise wrong from None
    host, _, port = place.partition("?")[0].strip("/").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise wrong
    return host.strip("[]"), int(port)

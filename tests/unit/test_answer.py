"""A cluster that does not answer is named in one line, within seconds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from ldm_ray.distributed import answer
from ldm_ray.distributed.cluster import joined
from ldm_ray.settings.errors import ConfigError
from tests.helpers.ports import free_port


def refusal(address: str, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as error, joined(address):
        raise AssertionError("there is no cluster to join")
    text = str(error.value)
    assert f"RAY_ADDRESS={address}" in text and "unset RAY_ADDRESS" in text and "\n" not in text
    return text


@pytest.mark.parametrize("kind", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}", "ray://localhost:{}"])
def test_where_nothing_listens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Connection refused" in refusal(kind.format(free_port()), monkeypatch)


@pytest.mark.parametrize("address", ["no-such-host.invalid:6379", "ray://no-such-host.invalid:10001"])
def test_a_host_name_that_is_not_known(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "host name no-such-host.invalid is not known" in refusal(address, monkeypatch)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "head", "head:", ":6379", "head:0", "head:99999", "ray://h"]
)
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "host:port" in refusal(address, monkeypatch)


@pytest.fixture(params=[b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "web server"])
def stranger(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that is not Ray's: one that takes connections and says nothing, and one of the Web."""
    with socket.create_server(("", 0)) as server:
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return
                taken[-1].sendall(request.param)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


@pytest.mark.parametrize("kind", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_what_is_no_ray(kind: str, stranger: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "WAIT_S", 0.3)
    assert "is no Ray" in refusal(kind.format(stranger), monkeypatch)

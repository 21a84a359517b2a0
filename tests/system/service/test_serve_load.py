"""The service under load: dropped connections, more than there is room for, deadlines."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.service import POST, TOKEN, Answer, Server


def quiet(server: Server) -> None:
    for _ in range(600):
        if server.metric("ldm_queue_work") == server.metric("ldm_images_live") == 0:
            return
        time.sleep(0.05)
    pytest.fail("the server still works on something")


def test_dropped_connections_stop_their_work(server: Server) -> None:
    quiet(server)
    before = server.metric("ldm_steps_total")
    count, body = 30, json.dumps({"n": 8, "sampler": "ddpm", "prompt": "1"}).encode()
    head = f"POST {POST} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n"
    sockets = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sockets.append(connection)
    while server.metric("ldm_images_live") == 0:
        time.sleep(0.01)
    for connection in sockets:
        connection.close()
    quiet(server)
    assert server.metric("ldm_steps_total") - before < count * 8 * 1000
    np.testing.assert_array_equal(server.images(seed=1, prompt="1"), server.generator([1], [1])[:, 0].numpy())


def test_overload_is_answered_by_200_and_429_alone(server: Server) -> None:
    def one(i: int) -> Answer:
        return server.ask(
            POST, {"n": 256, "seed": i, "prompt": "1", "num_inference_steps": 30}, accept="application/x-npy"
        )

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(one, range(80)))
    statuses = {answer.status for answer in answers}
    assert statuses <= {200, 429} and 200 in statuses and 429 in statuses, statuses
    for answer in answers:
        if answer.status == 429:
            assert answer.error["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
    quiet(server)
    assert server.images(seed=1, prompt="1").shape == (1, 28, 28)


def test_a_deadline_is_408_and_short_requests_pass(server: Server) -> None:
    heavy = {"n": 256, "sampler": "ddpm", "guidance_scale": 3.0, "prompt": "1"}
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.ask, POST, heavy) for _ in range(3)]
        while server.metric("ldm_images_live") == 0:
            time.sleep(0.01)
        short = server.ask(POST, {"prompt": "5"})
        assert short.status == 200 and not all(one.done() for one in waiting)
        statuses = [one.result().status for one in waiting]
    assert 408 in statuses and set(statuses) <= {200, 408, 429}  # 429: known at once to come too late
    quiet(server)

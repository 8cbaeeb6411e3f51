"""What the ranks say to each other, and the thread that hears it."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest

from beit.job import member as member_module
from beit.job.hub import Hub
from beit.job.member import Member
from beit.job.messages import Channel, wait
from beit.job.processes import Process

TIMES = {"limit": 10.0, "heartbeat": 0.1}


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(**TIMES, everywhere=False)
    made.start()
    yield made
    assert made.is_alive(), "the thread ended by itself"
    made.close()
    assert not made.is_alive()


def pair() -> tuple[Channel, Channel]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = Channel(socket.create_connection(server.getsockname()))
        return one, Channel(server.accept()[0])


def heard(channel: Channel, count: int, seconds: float = 5.0) -> list[dict[str, Any]]:
    """So many messages, or fewer if no more come."""
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    while len(found) < count and not channel.ended and time.monotonic() < deadline:
        wait([channel], 0.1)
        found += channel.receive()
    return found


def register(hub: Hub, rank: int, *, machine: str = "here") -> Channel:
    channel = Channel(socket.create_connection(("127.0.0.1", hub.port)))
    process = vars(replace(Process.this(), machine=machine))
    channel.send("hello", token=hub.token, rank=rank, process=process, host=machine)
    return channel


def test_a_peer_that_does_not_read_for_a_while_misses_nothing() -> None:
    one, other = pair()
    text = "x" * 20_000
    for number in range(400):  # more than any buffer of the kernel's
        one.send("said", number=number, text=text)
    got = other.receive()
    for number in range(400, 410):
        one.send("said", number=number, text=text)
        got += heard(other, 1000, seconds=0.2)
    numbers = [message["number"] for message in got]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 409
    assert not one.ended


def test_what_was_said_before_the_end_is_heard_also_when_an_answer_fails() -> None:
    one, other = pair()
    other.send("answer")  # never read: the end is then a reset
    one.send("left", code=0)
    one.close()
    time.sleep(0.05)
    for _ in range(3):
        other.send("answer")
    assert [message["kind"] for message in other.receive()] == ["left"]
    assert other.ended


def test_many_open_files_are_no_obstacle() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("the machine allows fewer")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    try:
        with ExitStack() as opened:
            for _ in range(1100):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            one, other = pair()
            one.send("hello")
            assert wait([other], 5.0) == [other]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "said",
    [
        b"\xff{no json\n",
        b'{"kind": "hello", "token": "\xc3\xa9"}\n',
        b'{"kind": "hello", "token": "\\ud800"}\n',
        b"[" * 500_000 + b"\n",
        b"{}\n",
    ],
    ids=["no json", "not ascii", "surrogate", "deep", "nothing"],
)
def test_strangers_are_turned_away(said: bytes, hub: Hub) -> None:
    with socket.create_connection(("127.0.0.1", hub.port)) as raw:
        raw.settimeout(5.0)
        raw.sendall(said)
        with suppress(ConnectionResetError):
            assert raw.recv(10) == b""
    assert hub.others() == 0


@pytest.mark.parametrize("token", ["guess", "", None])
def test_a_wrong_token_is_turned_away(token: str | None, hub: Hub) -> None:
    channel = Channel(socket.create_connection(("127.0.0.1", hub.port)))
    token = hub.token[:-1] if token is None else token
    channel.send("hello", token=token, rank=1, process=vars(Process.this()), host="x")
    assert heard(channel, 1) == []
    assert channel.ended


def test_ranks_are_told_of_those_that_concern_them(hub: Hub) -> None:
    """Rank 0 of all; the others of rank 0 and of those on their machine."""
    machines = {0: "a", 1: "a", 2: "b", 3: "b"}
    known: dict[int, set[int]] = {rank: set() for rank in machines}
    channels = {}
    for rank, machine in machines.items():
        channels[rank] = register(hub, rank, machine=machine)
        for message in heard(channels[rank], 1):
            known[rank] |= set(map(int, message["members"]))
    for rank, channel in channels.items():
        for message in heard(channel, 10, seconds=0.3):
            known[rank] |= set(map(int, message["members"]))
    assert known == {0: {0, 1, 2, 3}, 1: {0, 1}, 2: {0, 2, 3}, 3: {0, 2, 3}}
    for channel in channels.values():
        channel.send("left", code=0)


def test_many_ranks_cost_rank_0_little(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they say: the judgement looks at all of them, so it is not made for each word."""
    judged = 0
    verdict = hub._judge.verdict

    def counted(now: float) -> Any:
        nonlocal judged
        judged += 1
        return verdict(now)

    monkeypatch.setattr(hub._judge, "verdict", counted)
    channels = [register(hub, rank) for rank in range(8)]
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        for channel in channels:
            channel.send("beat", ticks=1, in_step=True, step=1, epoch=0, where="")
            time.sleep(0.001)
            channel.receive()
    assert judged <= 20 * (time.monotonic() - began)
    for channel in channels:
        channel.send("left", code=0)


def test_a_rank_that_waits_for_the_others_to_meet_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0

    def counted(readable: list[Any], seconds: float) -> list[Any]:
        nonlocal rounds
        rounds += 1
        return wait(readable, seconds)

    monkeypatch.setattr(member_module, "wait", counted)
    member = Member(**TIMES, hub=None)
    member.start()
    time.sleep(0.5)
    member.leave(0)
    assert not member.is_alive()
    assert rounds < 20


def test_the_hub_of_several_machines_is_reached_over_both_protocols() -> None:
    hub = Hub(**TIMES, everywhere=True)
    hub.start()
    hosts = ["127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])]
    for host in hosts:
        with socket.create_connection((host, hub.port), timeout=5.0) as raw:
            raw.sendall(json.dumps({"kind": "hello", "token": "guess"}).encode() + b"\n")
            assert raw.recv(10) == b""
    hub.close()


def test_the_place_is_that_of_the_thread_that_trains() -> None:
    """Which is not the main one where a program of the user's calls from another."""
    found: list[dict[str, Any]] = []

    def train() -> None:
        found.append(Member(**TIMES, hub=None)._stack())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert "in train" in found[0]["where"]

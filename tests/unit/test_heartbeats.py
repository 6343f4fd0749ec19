"""A site's heartbeat: what it tells, how it is read, how it vanishes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pynvml
import pytest
from pydantic import SecretStr
from redis import Redis

from common.broker import connect
from common.errors import BrokerUnavailable
from common.heartbeats import Gpu, Heartbeat, read_heartbeats, remove_heartbeat, write_heartbeat
from common.queues import heartbeat_key
from common.settings import Settings
from tests.servers import ValkeyServer, free_ports, valkey, wait_for
from worker import heartbeat as site_heartbeat
from worker.heartbeat import Pulse

BEAT = Heartbeat(
    version="0.1.0",
    boot_id="boot",
    at=1.5,
    cpu_percent=12.5,
    memory_total=8,
    memory_available=4,
    disk_free=2,
    gpus=(Gpu(name="H100", memory_total=80, memory_used=8, utilization=50),),
    slots=2,
    free_slots=1,
    working_on=("digits, round 3",),
    trainers=("digits",),
)


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with valkey() as running:
        yield running


@pytest.fixture
def broker(server: ValkeyServer) -> Iterator[Redis]:
    with Redis.from_url(server.url) as client:
        client.flushdb()
        yield client


def settings(url: str, folder: Path, **more: Any) -> Settings:
    return Settings(
        broker_url=SecretStr(url),
        site_name="alpha",
        site_folder=folder,
        site_trainers={"digits": "examples.digits.trainer:DigitsTrainer"},
        **{"heartbeat_seconds": 0.05, **more},
    )


def test_what_is_written_is_read_and_who_is_silent_is_missing(broker: Redis) -> None:
    write_heartbeat(broker, "alpha", BEAT, lifetime_seconds=60)
    assert read_heartbeats(broker, ["alpha", "beta"]) == {"alpha": BEAT}
    assert read_heartbeats(broker, []) == {}


def test_a_heartbeat_vanishes_by_itself(broker: Redis) -> None:
    write_heartbeat(broker, "alpha", BEAT, lifetime_seconds=0.05)
    wait_for(lambda: read_heartbeats(broker, ["alpha"]) == {}, seconds=5, what="the heartbeat to expire")


def test_a_heartbeat_of_a_newer_version_is_read(broker: Redis) -> None:
    newer = BEAT.model_dump() | {"version": "9.0", "mood": "good"}
    broker.set(heartbeat_key("alpha"), msgpack.packb(newer))
    assert read_heartbeats(broker, ["alpha"])["alpha"].version == "9.0"


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", msgpack.packb({"version": 1}), b"x" * 70_000])
def test_an_unreadable_heartbeat_counts_as_none_and_harms_nobody_else(broker: Redis, data: bytes) -> None:
    broker.set(heartbeat_key("alpha"), data)
    write_heartbeat(broker, "beta", BEAT, lifetime_seconds=60)
    assert list(read_heartbeats(broker, ["alpha", "beta"])) == ["beta"]


def test_only_one_s_own_heartbeat_is_removed(broker: Redis) -> None:
    write_heartbeat(broker, "alpha", BEAT, lifetime_seconds=60)
    remove_heartbeat(broker, "alpha", "an earlier boot")
    assert list(read_heartbeats(broker, ["alpha"])) == ["alpha"]
    remove_heartbeat(broker, "alpha", "boot")
    assert read_heartbeats(broker, ["alpha"]) == {}


def test_an_absent_broker_is_told() -> None:
    (port,) = free_ports(1)
    with Redis(port=port) as client, pytest.raises(BrokerUnavailable):
        read_heartbeats(client, ["alpha"])


def test_a_pulse_tells_of_the_site_and_ends_without_a_trace(
    broker: Redis, server: ValkeyServer, tmp_path: Path
) -> None:
    pulse = Pulse(settings(server.url, tmp_path), slots=2, working_on=lambda: ["digits, round 3"])
    pulse.start()
    wait_for(lambda: "alpha" in read_heartbeats(broker, ["alpha"]), seconds=5, what="a heartbeat")
    found = read_heartbeats(broker, ["alpha"])["alpha"]
    assert (found.slots, found.free_slots, found.working_on) == (2, 1, ("digits, round 3",))
    assert (found.trainers, found.boot_id, found.version) == (("digits",), pulse.boot_id, "0.1.0")
    assert 0 < found.memory_available <= found.memory_total
    assert found.disk_free > 0
    wait_for(lambda: read_heartbeats(broker, ["alpha"])["alpha"].at > found.at, seconds=5, what="another heartbeat")
    pulse.stop()
    assert read_heartbeats(broker, ["alpha"]) == {}


def test_a_pulse_outlives_the_broker_s_absence(
    broker: Redis,
    server: ValkeyServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    (port,) = free_ports(1)
    tried = []

    def connect_where_the_broker_is(absent: Settings) -> Redis:
        tried.append(absent)
        return connect(absent if len(tried) < 4 else settings(server.url, tmp_path))

    monkeypatch.setattr(site_heartbeat, "connect", connect_where_the_broker_is)
    pulse = Pulse(settings(f"redis://127.0.0.1:{port}/0", tmp_path), slots=1, working_on=list)
    pulse.start()
    wait_for(lambda: "The broker is back" in caplog.text, seconds=10, what="the return to be logged")
    assert "alpha" in read_heartbeats(broker, ["alpha"])
    pulse.stop()
    assert caplog.text.count("No heartbeat") == 1


def test_graphics_cards_are_read_through_nvidia_s_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Values:
        total, used, gpu = 80, 8, 50

    for name, value in {
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetMemoryInfo": Values,
        "nvmlDeviceGetName": b"H100",
        "nvmlDeviceGetUtilizationRates": Values,
    }.items():
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)
    monkeypatch.setattr(site_heartbeat, "_has_nvml", lambda: True)
    assert site_heartbeat.read_gpus() == BEAT.gpus


def test_a_machine_without_nvidia_s_driver_has_no_graphics_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    site_heartbeat._has_nvml.cache_clear()
    assert site_heartbeat.read_gpus() == ()
    site_heartbeat._has_nvml.cache_clear()

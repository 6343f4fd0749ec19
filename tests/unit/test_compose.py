"""compose/ is whole: what can be known of it without a container engine."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.settings import CONFIG_VARIABLE, ENV_PREFIX, Settings
from coordinator.jobfile import read_job_file
from worker.trainers import Trainers

FOLDER = Path(__file__).resolve().parents[2] / "compose"
TEXT = (FOLDER / "compose.yaml").read_text("utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = dict(re.findall(r"^([A-Z_]+)=(.*)$", (FOLDER / ".env.example").read_text("utf-8"), re.MULTILINE))
DOCKERFILE = (FOLDER / "Dockerfile").read_text("utf-8")

LONG_RUNNING = ("redis", "minio", "postgres", "coordinator", "http", "flower", "site-1", "site-2")
ONCE = ("enroll", "sample-data")
NOT_SECRET = {"TORCH_INDEX_URL"}

_VARIABLE = re.compile(r"(?<!\$)\$\{([A-Z_]+)(:\?[^}]+|:-)?\}")


def environment(service: str) -> dict[str, str]:
    variables: dict[str, str] = SERVICES[service].get("environment", {})
    return variables


def test_every_service_is_there() -> None:
    assert sorted(SERVICES) == sorted([*LONG_RUNNING, *ONCE, "fedchord"])


@pytest.mark.parametrize("service", LONG_RUNNING)
def test_long_running_service_is_checked_and_restarted(service: str) -> None:
    assert SERVICES[service]["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
    assert SERVICES[service]["restart"] == "unless-stopped"


@pytest.mark.parametrize("service", ONCE)
def test_service_that_runs_once_is_waited_for(service: str) -> None:
    waiting = [
        each["depends_on"][service]["condition"] for each in SERVICES.values() if service in each.get("depends_on", {})
    ]
    assert set(waiting) == {"service_completed_successfully"}
    assert "restart" not in SERVICES[service]


@pytest.mark.parametrize("service", list(SERVICES))
def test_what_a_service_waits_for_exists_and_can_come(service: str) -> None:
    for other, how in SERVICES[service].get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert other in ONCE


@pytest.mark.parametrize("service", list(SERVICES))
def test_named_volumes_and_networks_are_declared(service: str) -> None:
    assert set(SERVICES[service].get("networks", [])) <= COMPOSE["networks"].keys()
    for volume in SERVICES[service].get("volumes", []):
        source = volume.partition(":")[0]
        assert source in COMPOSE["volumes"] or (FOLDER / source).exists()


def test_every_variable_is_in_the_example_and_the_other_way_round() -> None:
    assert {name for name, _ in _VARIABLE.findall(TEXT)} == EXAMPLE.keys()


def test_nothing_starts_without_the_secrets() -> None:
    for name, fallback in _VARIABLE.findall(TEXT):
        assert fallback.startswith(":?") or name in NOT_SECRET, name


def test_example_has_no_value() -> None:
    assert set(EXAMPLE.values()) == {""}


def test_dotenv_is_not_committed() -> None:
    assert ".env" in (FOLDER / ".gitignore").read_text("utf-8").splitlines()


def test_no_secret_stands_in_the_file() -> None:
    for service in SERVICES:
        for name, value in environment(service).items():
            if re.search(r"PASSWORD|SECRET_KEY|ACCESS_KEY|AUTH|_USER$|_URL$", name) and name != "POSTGRES_USER":
                left = _VARIABLE.sub("", value)
                assert re.fullmatch(r"[a-z+]+://(fedchord)?:@[a-z]+:\d+/\w+|:?", left), f"{service}: {name}"


@pytest.mark.parametrize("service", list(SERVICES))
def test_settings_are_real_and_valid(service: str) -> None:
    ours = {name: value for name, value in environment(service).items() if name.startswith(ENV_PREFIX)}
    ours.pop(CONFIG_VARIABLE, None)
    values: dict[str, Any] = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in ours.items()}
    if "site_trainers" in values:
        values["site_trainers"] = json.loads(values["site_trainers"])
    Settings(**values)


@pytest.mark.parametrize("service", ["site-1", "site-2"])
def test_site_knows_no_secret_but_its_own_and_reaches_no_database(service: str) -> None:
    assert not _VARIABLE.search(str(environment(service)))
    assert set(SERVICES[service]["networks"]).isdisjoint(SERVICES["postgres"]["networks"])
    other = "site-2" if service == "site-1" else "site-1"
    assert not [volume for volume in SERVICES[service]["volumes"] if volume.startswith((other, "coordinator"))]


@pytest.mark.parametrize("service", ["site-1", "site-2"])
def test_sites_trainers_can_be_imported(service: str) -> None:
    Trainers(json.loads(environment(service)["FEDCHORD_SITE_TRAINERS"])).check()


@pytest.mark.parametrize("service", ["coordinator", "site-1", "site-2"])
def test_health_check_asks_the_service_itself(service: str) -> None:
    assert SERVICES[service]["hostname"] == service
    assert SERVICES[service]["healthcheck"]["test"][-1] == f"{service}@{service}"


def test_only_flower_and_the_http_service_are_published_and_on_loopback_only() -> None:
    assert {name: each["ports"] for name, each in SERVICES.items() if "ports" in each} == {
        "flower": ["127.0.0.1:5555:5555"],
        "http": ["127.0.0.1:8790:8790"],
    }


def test_http_service_asks_for_keys() -> None:
    assert environment("http")["FEDCHORD_HTTP_ACCESS"] == "keys"
    assert environment("http")["FEDCHORD_STORE_KEY_FILE"].startswith("/state/")  # which outlives the container


def test_images_are_pinned() -> None:
    for service in ("redis", "minio", "postgres"):
        assert re.fullmatch(r"[a-z/]+:[\w.-]*\d[\w.-]*", SERVICES[service]["image"])


def test_targets_are_in_the_dockerfile_and_its_last_user_has_no_rights() -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)
    targets = {each["build"]["target"] for each in SERVICES.values() if "build" in each}
    assert targets == set(stages)
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE)[-1] == "fedchord"


def test_what_the_dockerfile_copies_is_let_through_and_there() -> None:
    allowed = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
               if line.startswith("!")}  # fmt: skip
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in shlex.split(line)}
    assert copied == allowed
    assert all((FOLDER.parent / name).exists() for name in copied)


def test_dockerfile_names_no_package_index() -> None:
    assert "://" not in DOCKERFILE


def test_sample_job_is_valid_and_fits_the_sites() -> None:
    spec = read_job_file(FOLDER / "jobs" / "digits.toml")
    assert spec.trainer in json.loads(environment("site-1")["FEDCHORD_SITE_TRAINERS"])
    assert spec.quorum(2) <= 2

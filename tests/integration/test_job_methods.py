"""`fedchord serve`: the coordinator's models and jobs over HTTP, by a real process beside a real coordinator."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import AccessDenied, Conflict, InvalidInput, NotFound
from common.messages import ModelTestRound, SwagRoundStart, TrainingStart, UpdateRoundStart
from coordinator.jobfile import JobSpec
from coordinator.submitting import submit
from store.client import Api
from store.database import writing
from store.model_stores import add_store
from store.tenants import add_tenant
from tests.federation import ROOT, Federation, ScriptedSite, clean_environment, federation, wait_until
from tests.servers import die_with_parent

FIRST = {"w": np.zeros(3, np.float32)}
SPEC = {"name": "over http", "trainer": "constant", "rounds": 1, "test_every": 0, "round_deadline_seconds": 30}


@contextmanager
def serving(running: Federation, *, log: str, **variables: str) -> Iterator[str]:
    """Run `fedchord serve`; give the URL that it tells."""
    with (running.folder / log).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", "--config", str(running.config), "serve", "--port", "0"],
            cwd=ROOT,
            env={**clean_environment(), **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    try:
        wait_until(lambda: "Serving http" in running.log(log) or process.poll() is not None, what="the service")
        yield next(word for word in running.log(log).split() if word.startswith("http://"))
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, running.log(log)


@dataclass
class Service:
    """A federation and its service."""

    running: Federation
    api: Api
    url: str

    @property
    def sites(self) -> tuple[ScriptedSite, ScriptedSite]:
        """Return both sites."""
        return self.running.sites["alpha"], self.running.sites["beta"]

    def submit(self, *, key: str | None = None, **changes: Any) -> dict[str, Any]:
        """Submit a job of one round, but for the changes."""
        for site in self.sites:
            site.forget()  # what a test before this one has left
        answer: dict[str, Any] = self.api.call("job.submit", spec={**SPEC, **changes}, key=key)
        return answer

    def get(self, job: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Return the job with its rounds."""
        answer: dict[str, Any] = self.api.call("job.get", job_id=job["job_id"], **options)
        return answer

    def put(self, tensors: dict[str, np.ndarray], store: str = "ddc:put") -> dict[str, Any]:
        """Put tensors as a safetensors file."""
        file = self.running.folder / "put.safetensors"
        save_file(tensors, file)
        self.api.initialize_model_store(store)
        return self.api.put_model(store, file)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("service")
        running = stack.enter_context(federation(folder, "alpha", "beta", shard_megabytes=1))
        stack.enter_context(running.coordinator())
        url = stack.enter_context(serving(running, log="http.log"))
        yield Service(running, stack.enter_context(Api(url)), url)


def test_a_job_runs_from_its_submission_to_its_end(service: Service) -> None:
    job = service.submit(test_every=1)
    assert (job["state"], job["sites"], job["model_store_ddc"]) == ("submitted", ["alpha", "beta"], "ddc:over http")
    for site in service.sites:
        site.start(FIRST)
    for site, value, examples in zip(service.sites, (1, 4), (1, 2), strict=True):
        site.answer(
            site.receive(), {"w": np.full(3, value, np.float32)}, num_examples=examples, metrics={"loss": value}
        )
    for site in service.sites:
        site.answer(site.receive(), metrics={"accuracy": 0.5})
    ended = service.get(job, wait_seconds=20)
    assert (ended["state"], ended["reason"]) == ("completed", "")
    assert [(each["kind"], each["number"], each["state"]) for each in ended["rounds"]] == [
        ("start", 0, "closed"),
        ("train", 1, "closed"),
        ("test", 1, "closed"),
    ]
    train = ended["rounds"][1]
    assert train["metrics"] == {"loss": 3}
    assert train["output_model_id"] == ended["model_id"]
    assert train["parts"] == [
        {"site": "alpha", "state": "accepted", "reason": "", "num_examples": 1, "metrics": {"loss": 1}},
        {"site": "beta", "state": "accepted", "reason": "", "num_examples": 2, "metrics": {"loss": 4}},
    ]
    assert ended["created_at"] <= ended["started_at"] <= ended["finished_at"]
    model = service.api.get_latest_aggregated_model("ddc:over http")
    assert model["model_id"] == ended["model_id"]
    assert model["index_hash"] == model["model_hash"]
    assert model["metrics"] == {"accuracy": 0.5}


def test_the_newest_rounds_are_told(service: Service) -> None:
    job = service.api.call("job.list", limit=1)[0]
    assert [each["kind"] for each in service.get(job, newest_rounds=1)["rounds"]] == ["test"]
    assert service.get(job, newest_rounds=0)["rounds"] == []


def test_waiting_ends_with_the_job_or_with_the_time(service: Service) -> None:
    job = service.submit()
    begun = time.monotonic()
    assert service.get(job, wait_seconds=1)["state"] in ("submitted", "running")
    assert 1 <= time.monotonic() - begun < 5
    ending = threading.Timer(0.5, lambda: service.api.call("job.abort", job_id=job["job_id"], reason="enough"))
    ending.start()
    begun = time.monotonic()
    ended = service.get(job, wait_seconds=30)
    ending.join()
    assert (ended["state"], ended["reason"]) == ("aborted", "enough")
    assert time.monotonic() - begun < 10
    with pytest.raises(Conflict, match="has ended"):
        service.api.call("job.abort", job_id=job["job_id"])


def test_the_same_key_is_the_same_job_also_for_many_at_once(service: Service) -> None:
    found: list[str] = []

    def again() -> None:
        found.append(service.api.call("job.submit", spec=SPEC, key="one.and-only:1")["job_id"])

    threads = [threading.Thread(target=again) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found))) == (8, 1)
    service.api.call("job.abort", job_id=found[0])
    job = service.submit(key="one.and-only:1", rounds=5)
    assert (job["job_id"], job["state"], job["num_rounds"]) == (found[0], "aborted", 1)
    assert [each["key"] for each in service.api.call("job.list", state="aborted", limit=1000)].count(job["key"]) == 1


@pytest.mark.parametrize(
    ("changes", "trouble"),
    [
        ({"rounds": -1}, "rounds: Input should be greater than or equal to 0, not -1"),
        ({"round": 1}, "round: is not a field of a job file"),
        ({"trainer": "unknown"}, "trainer: 'unknown' is not on the list of alpha, beta"),
        ({"strategy": {"name": "fedbest"}}, "strategy.name: there is no strategy 'fedbest'"),
        ({"initial_model": {"file": "/etc/hosts"}}, "initial_model.file: put the file into the model store"),
        ({"name": "x" * 10_000}, "name: String should have at most 100 characters, not 'xxx"),
        ({"sites": ["delta"]}, "sites: no site 'delta'"),
    ],
)
def test_a_job_that_cannot_run_is_refused_with_its_field(
    service: Service, changes: dict[str, Any], trouble: str
) -> None:
    before = service.api.call("job.list")
    with pytest.raises(InvalidInput, match=trouble) as raised:
        service.submit(**changes)
    assert len(raised.value.message) < 1000
    assert service.api.call("job.list") == before


@pytest.mark.parametrize(
    ("method", "params", "trouble"),
    [
        ("job.submit", {"spec": []}, "Parameter spec is wrong"),
        ("job.submit", {"spec": SPEC, "key": "with space"}, "The key 'with space' is not valid"),
        ("job.submit", {"spec": SPEC, "key": "k" * 201}, "The key 'kkk"),
        ("job.get", {"job_id": "x", "wait_seconds": 31}, "wait_seconds is 31; it may be 0 to 30"),
        ("job.get", {"job_id": "x", "wait_seconds": "1"}, "Parameter wait_seconds is wrong"),
        ("job.list", {"state": "asleep"}, "Parameter state is wrong"),
        ("job.list", {"limit": 0}, "limit is 0; it may be 1 to 1000"),
        ("job.abort", {"job_id": "x", "reason": "r" * 2001}, "the length of reason is 2001"),
    ],
)
def test_a_wrong_parameter_is_named(service: Service, method: str, params: dict[str, Any], trouble: str) -> None:
    with pytest.raises(InvalidInput, match=trouble):
        service.api.call(method, **params)


def test_an_unknown_job_is_not_found(service: Service) -> None:
    for method in ("job.get", "job.abort"):
        with pytest.raises(NotFound, match="There is no job 'no-such-job'"):
            service.api.call(method, job_id="no-such-job")


def test_a_job_of_no_rounds_builds_a_model(service: Service) -> None:
    job = service.submit(rounds=0)
    for site in service.sites:
        site.start(FIRST, num_examples=3)
    ended = service.get(job, wait_seconds=20)
    assert [(each["kind"], each["number"]) for each in ended["rounds"]] == [("start", 0)]
    assert [part["num_examples"] for part in ended["rounds"][0]["parts"]] == [3, 3]
    assert service.api.get_model_info("ddc:over http", ended["model_id"])["model_kind"] == "initial"


def test_a_job_of_no_rounds_tests_a_model_and_collects_its_moments(service: Service) -> None:
    given = service.put({"w": np.full(3, 7, np.float32)})
    job = service.submit(rounds=0, test_every=1, swag=True, initial_model={"model": given["model_id"]})
    for site in service.sites:
        message = site.receive()
        assert isinstance(message, TrainingStart)
        assert not message.build_model
        site.answer(message, num_examples=2)
    for site in service.sites:
        message = site.receive()
        assert isinstance(message, ModelTestRound)
        assert message.model.digest == given["index_hash"]
        site.answer(message, num_examples=2, metrics={"accuracy": 0.25})
    for site in service.sites:
        message = site.receive()
        assert isinstance(message, SwagRoundStart)
        moments = {"first/w": np.full(3, 7, np.float32), "second/w": np.full(3, 49, np.float32)}
        site.answer(message, moments, num_examples=2)
    ended = service.get(job, wait_seconds=20)
    assert [(each["kind"], each["number"], each["state"]) for each in ended["rounds"]] == [
        ("start", 0, "closed"),
        ("test", 0, "closed"),
        ("swag", 0, "closed"),
    ]
    assert ended["model_id"] == given["model_id"]
    assert service.api.get_model_info("ddc:put", given["model_id"])["metrics"] == {"accuracy": 0.25}


def test_a_put_file_of_any_size_can_be_trained(service: Service) -> None:
    """It is one file, but the sites' updates have as many shards as the coordinator's settings say."""
    tensors = {f"t{number}": np.full(150_000, number, np.float32) for number in range(5)}  # 0.6 MB each
    given = service.put(tensors)
    assert (len(given["shards"]), given["model_hash"] != given["index_hash"]) == (1, True)
    job = service.submit(initial_model={"model": given["model_id"]})
    for site in service.sites:
        site.start()
    for site in service.sites:
        message = site.receive()
        assert isinstance(message, UpdateRoundStart)
        assert (len(message.model.shards), message.model.digest) == (1, given["index_hash"])
        assert len(message.upload_urls) == 5
        site.answer(message, {name: tensor + 1 for name, tensor in tensors.items()})
    ended = service.get(job, wait_seconds=20)
    assert ended["state"] == "completed", ended["reason"]
    info = service.api.get_model_info("ddc:over http", ended["model_id"])
    assert len(info["shards"]) == 5
    assert service.running.model(job["job_id"])["t4"][:2].tolist() == [5, 5]
    assert [
        each["model_id"] for each in service.api.get_models("ddc:put", conds={"=": ["model_id", given["model_id"]]})
    ]


def test_what_no_site_can_train_is_refused(service: Service, tmp_path: Path) -> None:
    nan = service.put({"w": np.array([0, np.nan], np.float32)})
    with pytest.raises(InvalidInput, match=r"initial_model.model: .* cannot be trained: Tensor 'w' is not finite"):
        service.submit(initial_model={"model": nan["model_id"]})
    (tmp_path / "opaque").write_bytes(b"no tensors")
    opaque = service.api.put_model("ddc:put", tmp_path / "opaque")
    with pytest.raises(InvalidInput, match=r"initial_model.model: Model .* holds no tensors"):
        service.submit(initial_model={"model": opaque["model_id"]})
    with pytest.raises(NotFound, match="There is no model 'none'"):
        service.submit(initial_model={"model": "none"})


def test_a_model_store_in_use_stays_and_anothers_is_not_written_to(service: Service) -> None:
    job = service.submit(name="in use")
    assert service.api.exists_store("ddc:in use")
    with pytest.raises(Conflict, match="puts its models into ddc:in use"):
        service.api.delete_store("ddc:in use")
    service.api.call("job.abort", job_id=job["job_id"])
    assert service.api.delete_store("ddc:in use") == 1
    with writing(service.running.services.engine) as connection:
        tenant, _ = add_tenant(connection, "somebody")
        add_store(connection, "ddc:theirs", tenant_id=tenant.tenant_id)
    before = service.api.call("job.list")
    with pytest.raises(Conflict, match="of another tenant"):
        service.submit(name="theirs")
    assert service.api.call("job.list") == before


def test_jobs_are_for_operators_only(service: Service) -> None:
    running = service.running
    with writing(running.services.engine) as connection:
        bee, secret = add_tenant(connection, "worker bee")
        boss, boss_secret = add_tenant(connection, "boss", is_operator=True)
    with serving(running, log="keys.log", FEDCHORD_HTTP_ACCESS="keys") as url:
        with Api(url, api_key=bee.api_key, secret=secret) as api:
            for method, params in (
                ("job.submit", {"spec": SPEC}),
                ("job.list", {}),
                ("job.get", {"job_id": "x"}),
                ("job.abort", {"job_id": "x"}),
            ):
                with pytest.raises(AccessDenied, match="Jobs are the operator's"):
                    api.call(method, **params)
        with Api(url, api_key=boss.api_key, secret=boss_secret) as api:
            for site in service.sites:
                site.forget()
            job = api.call("job.submit", spec=SPEC)
            assert job["submitted_by"] == "boss"
            api.call("job.abort", job_id=job["job_id"])
        with Api(url, api_key=boss.api_key, secret="wrong") as api, pytest.raises(AccessDenied, match="not those of"):
            api.call("job.list")
    assert "send the API key and secret of a tenant" in running.log("keys.log")


def test_a_service_open_to_all_does_not_listen_to_all(service: Service) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "coordinator.cli",
            "--config",
            str(service.running.config),
            "serve",
            "--host",
            "0.0.0.0",
        ],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "access is open" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_the_start_can_have_a_deadline_of_its_own(service: Service) -> None:
    job = submit(
        service.running.services,
        JobSpec.model_validate({**SPEC, "name": "quick start", "start_deadline_seconds": 1.0, "min_sites": 2}),
    )
    begun = time.monotonic()
    ended = service.get({"job_id": job.job_id}, wait_seconds=30)
    assert time.monotonic() - begun < 10
    assert "no answer before the deadline" in ended["reason"]

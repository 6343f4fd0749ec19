"""Jobs over two levels of real processes: a centre whose sites are edges, each a stack of its own."""

import json
import os
import signal
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common.errors import NotFound
from common.settings import Settings
from coordinator.stack import lifecycle
from coordinator.stack.wishes import Wishes
from store.client import Api
from store.tensors import read_tensors
from tests.workplace import Workplace, wait_for

pytestmark = pytest.mark.timeout(300)  # five stacks are started and stopped

EDGE = "worker.edge:EdgeTrainer"
SITES = {  # edge -> site -> what it moves the model to, and for how many examples that counts
    "edge-1": {"a": (1.0, 10), "b": (4.0, 1)},
    "edge-2": {"c": (-3.0, 7), "d": (0.5, 2)},
}
TRAINER = '''\
import json
import time

import numpy as np

from worker.trainer import Evaluation, Fit, Trainer


class Pulling(Trainer):
    """Go half of the way to the site's own target, and count."""

    def __init__(self, context):
        super().__init__(context)
        self.target, self.examples = json.loads((context.data / "site.json").read_text())

    def build(self):
        return {"w": np.random.default_rng(self.context.seed).normal(size=1000).astype(np.float32),
                "count": np.array(0, np.int64)}

    def fit(self, tensors, step):
        for _ in range(int(100 * self.context.config.get("seconds", 0))):
            time.sleep(0.01)
            step.report(0.5, "pulling")
        tensors = {"w": (tensors["w"] + np.float32(self.target)) / 2, "count": tensors["count"] + 1}
        return Fit(tensors=tensors, num_examples=self.examples, metrics={"target": self.target})

    def evaluate(self, tensors, step):
        distance = float(np.abs(tensors["w"] - self.target).mean())
        return Evaluation(num_examples=self.examples, metrics={"distance": distance})

    def num_examples(self):
        return self.examples
'''


@dataclass
class Places:
    """The folders of a federation, and its stacks."""

    folder: Path

    def data(self, name: str, sites: dict[str, tuple[float, int]]) -> Path:
        """Write the data of a stack's sites."""
        for site, values in sites.items():
            (self.folder / name / "data" / site).mkdir(parents=True)
            (self.folder / name / "data" / site / "site.json").write_text(json.dumps(values))
        return self.folder / name / "data"

    def up(self, name: str, data: Path, trainer: str) -> str:
        """Start a stack; return the URL of its service."""
        wishes = Wishes(trainers={"pulling": trainer}, site_data=data, working_folder=self.folder)
        url = lifecycle.up(self.folder / name / "stack", wishes).http
        assert url is not None
        return url

    def down(self, name: str) -> None:
        """Stop a stack if there is one."""
        try:
            lifecycle.down(self.folder / name / "stack")
        except NotFound:
            return

    def pid(self, name: str, process: str) -> int:
        """Return the process id of one of a stack's processes."""
        found = lifecycle.status(self.folder / name / "stack").processes
        return next(each.pid for each in found if each.name == process)

    def settings(self, name: str) -> Settings:
        """Return a stack's settings."""
        return Settings.load(self.folder / name / "stack" / "fedchord.toml")


def add_edge(data: Path, name: str, url: str, **values: Any) -> None:
    """Make the edge behind the URL a site of the stack with this data."""
    (data / name).mkdir(parents=True, exist_ok=True)
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in {"url": url, "min_sites": 2, **values}.items()]
    (data / name / "edge.toml").write_text("".join(lines))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """Run a centre with two edges of two sites, and beside it one stack of all four sites."""
    places = Places(tmp_path_factory.mktemp("hierarchy"))
    (places.folder / "pulling.py").write_text(TRAINER)
    names = ["flat", "centre", *SITES]
    for name in SITES:
        (places.folder / "centre" / "data" / name).mkdir(parents=True)
    every = {site: values for sites in SITES.values() for site, values in sites.items()}
    starts: Sequence[tuple[str, Path, str]] = [
        ("flat", places.data("flat", every), "pulling:Pulling"),
        ("centre", places.folder / "centre" / "data", EDGE),
        *((name, places.data(name, sites), "pulling:Pulling") for name, sites in SITES.items()),
    ]
    try:
        with ThreadPoolExecutor(2) as pool:
            urls = dict(zip(names, pool.map(lambda start: places.up(*start), starts), strict=True))
        for name in SITES:
            add_edge(places.folder / "centre" / "data", name, urls[name])
        yield places
    finally:
        for name in names:
            places.down(name)
        left = [each for each in psutil.process_iter() if _runs_in(each, places.folder)]
        assert left == []


def _runs_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and str(folder) in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture
def centre(places: Places) -> Iterator[Api]:
    with _api(places, "centre") as api:
        yield api


def _api(places: Places, name: str) -> Api:
    return Api(f"http://127.0.0.1:{places.settings(name).http_port}")


def submit(api: Api, name: str, **changes: Any) -> str:
    """Submit a job; return its id."""
    spec = {"name": name, "trainer": "pulling", "rounds": 3, "seed": 5, "round_deadline_seconds": 60, **changes}
    return str(api.call("job.submit", spec=spec)["job_id"])


def finish(api: Api, job_id: str, *, seconds: float = 90) -> dict[str, Any]:
    """Return the job when it has ended."""
    job: dict[str, Any] = {}

    def ended() -> bool:
        job.update(api.call("job.get", job_id=job_id, wait_seconds=5))
        return job["state"] not in ("submitted", "running")

    wait_for(ended, seconds=seconds, what=f"job {job_id} ends")
    return job


def model(api: Api, job: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of the job's model, fetched from the service."""
    path = folder / f"{job['model_id']}.safetensors"
    path.write_bytes(b"".join(api.load_model(job["model_store_ddc"], job["model_id"])))
    return read_tensors(path)


def run(api: Api, folder: Path, name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run a job to its end; return it and its model."""
    job = finish(api, submit(api, name, **changes))
    assert job["state"] == "completed", job["reason"]
    return job, model(api, job, folder)


def test_averaging_over_two_levels_is_averaging_over_all_sites(places: Places, centre: Api, tmp_path: Path) -> None:
    with _api(places, "flat") as api:
        flat_job, flat = run(api, tmp_path, "same", min_sites=4)
    job, tensors = run(centre, tmp_path, "same", min_sites=2)
    assert tensors.keys() == flat.keys()
    assert np.allclose(tensors["w"], flat["w"], rtol=1e-6, atol=1e-6)
    assert (tensors["count"], flat["count"]) == (3, 3)
    by_kind = {(each["kind"], each["number"]): each for each in job["rounds"]}
    flat_by_kind = {(each["kind"], each["number"]): each for each in flat_job["rounds"]}
    assert list(by_kind) == list(flat_by_kind)
    examples = {part["site"]: part["num_examples"] for part in by_kind["train", 3]["parts"]}
    assert examples == {"edge-1": 11, "edge-2": 9}
    for which in (("train", 1), ("test", 3)):
        for name, value in flat_by_kind[which]["metrics"].items():
            assert by_kind[which]["metrics"][name] == pytest.approx(value, rel=1e-5)


def test_the_edges_have_the_final_model_and_what_came_before_it(places: Places, centre: Api, tmp_path: Path) -> None:
    _, tensors = run(centre, tmp_path, "handed down", rounds=1, min_sites=2)
    for name in SITES:
        with _api(places, name) as api:
            wait_for(lambda api=api: _latest(api, "ddc:handed down"), seconds=30, what="the final model is there")
            transferred = api.get_latest_transferred_model("ddc:handed down")
            assert (transferred["model_kind"], transferred["model_state"]) == ("global", 40)
            own = api.get_latest_aggregated_model("ddc:handed down")
            wait_for(
                lambda api=api: _final(api, "ddc:handed down", tmp_path, tensors), seconds=30, what="it is the last one"
            )
            depth = {each["model_kind"] for each in api.get_models("ddc:handed down", conds={"=": ["site", None]})}
            assert "global" in depth
            assert own["num_examples"] == sum(examples for _, examples in SITES[name].values())


def _latest(api: Api, store: str) -> bool:
    return bool(api.exists_store(store) and api.get_models(store, conds={"=": ["model_state", 40]}, limit=1))


def _final(api: Api, store: str, folder: Path, tensors: dict[str, np.ndarray]) -> bool:
    info = api.get_latest_transferred_model(store)
    found = model(api, {"model_store_ddc": store, "model_id": info["model_id"]}, folder)
    return bool(np.array_equal(found["w"], tensors["w"]))


def test_an_edge_and_a_plain_site_work_in_one_job(places: Places, tmp_path: Path) -> None:
    """And an edge below an edge: three levels, since the edge of the mixed centre is a centre itself."""
    data = places.data("mixed", {"plain": (2.0, 5)})
    add_edge(data, "deep", f"http://127.0.0.1:{places.settings('centre').http_port}")
    add_edge(data, "near", f"http://127.0.0.1:{places.settings('edge-1').http_port}")
    try:
        places.up("mixed", data, "pulling:Pulling")
        for name in ("deep", "near"):  # the edges' sites have the edge's trainer in place of the real one
            site = places.folder / "mixed" / "stack" / "sites" / name / "site.toml"
            assert tomllib.loads(site.read_text())["site_trainers"] == {"pulling": "pulling:Pulling"}
            site.write_text(site.read_text().replace("pulling:Pulling", EDGE))
            os.kill(places.pid("mixed", name), signal.SIGTERM)
        wait_for(lambda: lifecycle.status(places.folder / "mixed" / "stack").is_well, seconds=30, what="it is well")
        with _api(places, "mixed") as api:
            job, tensors = run(api, tmp_path, "mixed", rounds=1, min_sites=3, test_every=0)
    finally:
        places.down("mixed")
    first = np.random.default_rng(5).normal(size=1000).astype(np.float32)
    parts = [(2.0, 5), *SITES["edge-1"].values(), *SITES["edge-1"].values(), *SITES["edge-2"].values()]
    mean = sum(target * examples for target, examples in parts) / sum(examples for _, examples in parts)
    assert np.allclose(tensors["w"], first / 2 + mean / 2, atol=1e-5)
    assert {part["site"]: part["num_examples"] for part in job["rounds"][1]["parts"]} == {
        "plain": 5,
        "near": 11,
        "deep": 20,
    }


def working(places: Places, edge: str) -> Callable[[], bool]:
    """Return a fact: that the edge is at work on a training round."""

    def fact() -> bool:
        with _api(places, edge) as api:
            running = api.call("job.list", state="running", limit=1)
            return bool(running and running[0]["current_round"] > 0)

    return fact


def test_a_job_goes_on_when_an_edges_service_and_a_site_of_an_edge_are_killed(
    places: Places, centre: Api, tmp_path: Path
) -> None:
    with _api(places, "flat") as api:
        _, flat = run(api, tmp_path, "killed", min_sites=4, test_every=0)
    job_id = submit(centre, "killed", min_sites=2, test_every=0, config={"seconds": 2})
    wait_for(working(places, "edge-1"), seconds=40, what="edge-1 trains")
    killed = places.pid("edge-1", "http")
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: centre.call("job.get", job_id=job_id)["current_round"] >= 2, seconds=60, what="round 2 has begun")
    wait_for(working(places, "edge-2"), seconds=40, what="edge-2 trains")
    os.kill(places.pid("edge-2", "d"), signal.SIGKILL)
    os.kill(places.pid("centre", "edge-2"), signal.SIGKILL)  # and whoever waits for the edge
    job = finish(centre, job_id)
    assert job["state"] == "completed", job["reason"]
    tensors = model(centre, job, tmp_path)
    assert np.allclose(tensors["w"], flat["w"], rtol=1e-6, atol=1e-6)
    assert tensors["count"] == 3
    assert places.pid("edge-1", "http") not in (0, killed)
    for edge in SITES:  # every part was one job of the edge, however often it was asked for
        with _api(places, edge) as api:
            keys = [each["key"] for each in api.call("job.list", limit=100) if str(each["key"]).startswith(job_id)]
            assert sorted(keys) == sorted(
                f"{job_id}.{part}.{edge}" for part in ("start.0", *(f"train.{n}" for n in (1, 2, 3)))
            )


def test_an_aborted_job_of_the_centre_ends_the_edges_jobs(places: Places, centre: Api) -> None:
    job_id = submit(centre, "aborted", min_sites=2, config={"seconds": 60})
    wait_for(working(places, "edge-1"), seconds=40, what="edge-1 trains")
    centre.call("job.abort", job_id=job_id, reason="enough")
    for edge in SITES:
        with _api(places, edge) as api:
            wait_for(lambda api=api: not api.call("job.list", state="running"), seconds=30, what=f"{edge} rests")
            newest = api.call("job.list", limit=1)[0]
            assert (newest["state"], newest["reason"]) == ("aborted", "The centre: The job was stopped.")


def test_a_demo_with_edges_tells_who_trained_what(workplace: Workplace) -> None:
    told = workplace.run("demo", "--edges", "2", "--sites", "3", "--rounds", "2", "--json", seconds=250).json
    assert (told["edges"], told["sites"], told["rounds"]) == (2, 3, 2)
    tree = {edge["name"]: [site["name"] for site in edge["sites"]] for edge in told["shares"]}
    assert tree == {"edge-1": ["site-1"], "edge-2": ["site-2", "site-3"]}
    for edge in told["shares"]:
        assert edge["num_examples"] == sum(site["num_examples"] for site in edge["sites"]) > 0
        assert 0 < edge["accuracy"] <= 1
    assert 0 < told["federated_accuracy"] <= 1
    assert workplace.processes() == []
    assert list(workplace.temporary.iterdir()) == []

"""An edge as one site: the trainer of `worker.edge` against a real edge, whose sites, coordinator and service run."""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import Declined, FedChordError, JobFailed, Unavailable
from common.settings import Settings
from coordinator.stack import lifecycle
from coordinator.stack.wishes import Wishes
from store.client import Api
from tests.federation import wait_until
from tests.servers import free_ports
from worker.edge import EdgeTrainer
from worker.trainer import Cancelled, JobContext, RoundContext

SITES = {"north": {"add": 1.0, "examples": 1}, "south": {"add": 5.0, "examples": 3}}
MEAN = (1 * 1.0 + 3 * 5.0) / 4

TRAINER = '''\
import json
import time

import numpy as np

from common.errors import Declined
from worker.trainer import Evaluation, Fit, Trainer


class Adding(Trainer):
    """Add the site's own number."""

    def __init__(self, context):
        super().__init__(context)
        self.site = json.loads((context.data / "site.json").read_text())

    def build(self):
        return {"w": np.full(3, self.context.seed, np.float32), "n": np.array(0, np.int64)}

    def num_examples(self):
        return self.site["examples"]

    def fit(self, tensors, step):
        for _ in range(int(100 * self.context.config.get("seconds", 0))):
            time.sleep(0.01)
            step.report(0.5, "adding")
        if self.context.config.get("fails"):
            raise Declined("no data today")
        tensors = {"w": tensors["w"] + np.float32(self.site["add"]), "n": tensors["n"] + 1}
        return Fit(tensors=tensors, num_examples=self.num_examples(), metrics={"seed": step.seed % 1000})

    def evaluate(self, tensors, step):
        first = float(tensors["w"][0])
        return Evaluation(num_examples=self.num_examples(), metrics={"first": first + self.site["add"]})

    def moments(self, tensors, step):
        value = tensors["w"] + np.float32(self.site["add"])
        return Fit(tensors={"first/w": value, "second/w": value**2}, num_examples=self.num_examples())
'''


@dataclass
class Edge:
    """A running edge."""

    folder: Path
    url: str
    api: Api
    made: int = 0

    def trainer(self, *, context: JobContext | None = None, **changes: Any) -> EdgeTrainer:
        """Return the trainer of a new job of the centre, or of the one that is given; changes are of edge.toml."""
        self.made += 1
        data = self.folder / f"data-{self.made}"
        data.mkdir()
        values = {"url": self.url, "min_sites": 2, **changes}
        (data / "edge.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        return EdgeTrainer(context or self.context(data=data))

    def context(self, *, data: Path, **changes: Any) -> JobContext:
        """Return what the centre's job would say."""
        values: dict[str, Any] = {
            "site": "edge-1",
            "job_id": str(uuid.uuid4()),
            "job_name": f"job {self.made}",
            "trainer": "adding",
            "config": {},
            "seed": 7,
            "data": data,
            "folder": data / "own",
        }
        return JobContext(**{**values, **changes})

    def jobs_of(self, trainer: EdgeTrainer) -> list[dict[str, Any]]:
        """Return the edge's jobs for the trainer, the oldest first."""
        found = self.api.call("job.list", limit=1000)
        return [job for job in reversed(found) if job["key"].startswith(trainer.context.job_id)]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("edge")
    (folder / "adding_at_the_edge.py").write_text(TRAINER)
    for name, site in SITES.items():
        (folder / "site-data" / name).mkdir(parents=True)
        (folder / "site-data" / name / "site.json").write_text(json.dumps(site))
    wishes = Wishes(
        trainers={"adding": "adding_at_the_edge:Adding"}, site_data=folder / "site-data", working_folder=folder
    )
    with ExitStack() as stack:
        stack.callback(lifecycle.down, folder / "stack")
        url = lifecycle.up(folder / "stack", wishes).http
        assert url is not None
        assert Settings.load(folder / "stack" / "fedchord.toml").http_port == int(url.rpartition(":")[2])
        yield Edge(folder=folder, url=url, api=stack.enter_context(Api(url)))


def step(number: int = 1, *, report: Callable[[float, str], None] = lambda *_: None, left: float = 60) -> RoundContext:
    return RoundContext(round=number, seed=11, report=report, seconds_left=left)


MODEL = {"w": np.array([0, 1, 2], np.float32), "n": np.array(4, np.int64)}


def test_fit_gives_the_weighted_mean_and_counts_for_all_examples(edge: Edge) -> None:
    fit = edge.trainer().fit(MODEL, step())
    assert fit.num_examples == 4
    assert fit.tensors["w"].tolist() == [MEAN, MEAN + 1, MEAN + 2]
    assert fit.tensors["n"] == 5
    assert set(fit.metrics) == {"seed"}
    assert all(tensor.flags.writeable for tensor in fit.tensors.values())  # they are the site's own


def test_several_rounds_at_the_edge_are_one_of_the_centre(edge: Edge) -> None:
    trainer = edge.trainer(rounds=3)
    fit = trainer.fit(MODEL, step())
    assert fit.tensors["w"].tolist() == [3 * MEAN, 3 * MEAN + 1, 3 * MEAN + 2]
    assert fit.num_examples == 4
    assert [job["num_rounds"] for job in edge.jobs_of(trainer)] == [3]


def test_a_part_that_is_done_again_takes_up_the_same_job(edge: Edge) -> None:
    trainer = edge.trainer()
    first, again = trainer.fit(MODEL, step()), EdgeTrainer(trainer.context).fit(MODEL, step())
    assert first.tensors["w"].tolist() == again.tensors["w"].tolist()
    later = trainer.fit(MODEL, step(2))
    assert later.num_examples == 4
    jobs = edge.jobs_of(trainer)
    assert [job["key"] for job in jobs] == [f"{trainer.context.job_id}.train.{number}.edge-1" for number in (1, 2)]
    given = edge.api.get_models(jobs[0]["model_store_ddc"], conds={"=": ["model_state", 40]})
    assert len(given) == 1  # the same model is sent once


def test_a_part_whose_process_was_killed_is_taken_up_while_its_job_runs(edge: Edge) -> None:
    trainer = edge.trainer()
    trainer = EdgeTrainer(edge.context(data=trainer.context.data, config={"seconds": 2}))

    class Killed(BaseException):
        """Ends the work where it stands, as a signal does."""

    def die(fraction: float, text: str) -> None:
        if text.startswith("job"):
            raise Killed

    with pytest.raises(Killed):
        trainer.fit(MODEL, step(report=die))
    assert [job["state"] for job in edge.jobs_of(trainer)] in (["submitted"], ["running"])
    assert EdgeTrainer(trainer.context).fit(MODEL, step()).tensors["w"].tolist() == [MEAN, MEAN + 1, MEAN + 2]
    assert [job["state"] for job in edge.jobs_of(trainer)] == ["completed"]


def test_evaluate_gives_the_weighted_metrics(edge: Edge) -> None:
    trainer = edge.trainer()
    evaluation = trainer.evaluate(MODEL, step())
    assert (evaluation.num_examples, evaluation.metrics) == (4, {"first": MEAN})
    assert [job["num_rounds"] for job in edge.jobs_of(trainer)] == [0]


def test_a_site_of_the_edge_builds_the_model_from_the_centres_seed(edge: Edge) -> None:
    trainer = edge.trainer()
    tensors, num_examples = trainer.begin_job(step(0), build=True)
    assert tensors is not None
    assert (tensors["w"].tolist(), num_examples) == ([7, 7, 7], 4)
    assert trainer.num_examples() == 4
    assert trainer.build()["w"].tolist() == [7, 7, 7]
    assert len(edge.jobs_of(trainer)) == 1


def test_moments_are_the_means_of_the_sites(edge: Edge) -> None:
    moments = edge.trainer().moments(MODEL, step())
    assert moments.num_examples == 4
    assert moments.tensors["first/w"].tolist() == [MEAN, MEAN + 1, MEAN + 2]
    assert moments.tensors["second/w"][0] == (1 * 1.0**2 + 3 * 5.0**2) / 4


def test_finish_leaves_the_final_model_as_transferred(edge: Edge) -> None:
    trainer = edge.trainer()
    trainer.finish(None, "failed")
    trainer.finish(MODEL, "completed")
    info = edge.api.get_latest_transferred_model(f"ddc:{trainer.context.job_name}")
    assert (info["model_kind"], info["model_state"]) == ("global", 40)
    blocks = edge.api.load_model(f"ddc:{trainer.context.job_name}", info["model_id"])
    assert len(b"".join(blocks)) == info["model_size"]


def test_a_cancelled_part_aborts_the_edges_job(edge: Edge) -> None:
    trainer = edge.trainer()
    trainer = EdgeTrainer(edge.context(data=trainer.context.data, config={"seconds": 60}))
    begun = time.monotonic()

    def report(fraction: float, text: str) -> None:
        if text.startswith("job") and time.monotonic() > begun + 1:
            raise Cancelled("The job was stopped.")

    with pytest.raises(Cancelled):
        trainer.fit(MODEL, step(report=report))
    assert time.monotonic() - begun < 10
    (job,) = edge.jobs_of(trainer)
    assert (job["state"], job["reason"]) == ("aborted", "The centre: The job was stopped.")


def test_the_edges_rounds_end_before_the_centres_deadline(edge: Edge) -> None:
    """A site that does not answer costs the edge's quorum, not the centre its answer."""
    trainer = edge.trainer()
    trainer = EdgeTrainer(edge.context(data=trainer.context.data, config={"seconds": 60}))
    begun = time.monotonic()
    with pytest.raises(JobFailed, match="the quorum is 2"):
        trainer.fit(MODEL, step(left=6))
    assert time.monotonic() - begun < 6


def test_what_the_edges_sites_refuse_is_told(edge: Edge) -> None:
    trainer = edge.trainer()
    trainer = EdgeTrainer(edge.context(data=trainer.context.data, config={"fails": True}))
    with pytest.raises(JobFailed, match="north declined: no data today; south declined: no data today"):
        trainer.fit(MODEL, step())


def test_a_trainer_may_have_another_name_at_the_edge(edge: Edge) -> None:
    trainer = edge.trainer(trainer="adding")
    elsewhere = EdgeTrainer(edge.context(data=trainer.context.data, trainer="centre-adding"))
    assert elsewhere.fit(MODEL, step()).num_examples == 4


def test_a_job_that_somebody_ends_at_the_edge_is_a_refusal(edge: Edge) -> None:
    trainer = edge.trainer()
    trainer = EdgeTrainer(edge.context(data=trainer.context.data, config={"seconds": 60}))

    def end() -> None:
        wait_until(lambda: edge.jobs_of(trainer))
        edge.api.call("job.abort", job_id=edge.jobs_of(trainer)[0]["job_id"], reason="maintenance")

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(Declined, match=r"The edge has ended its job .*: maintenance"):
        trainer.fit(MODEL, step())
    ending.join()


def test_a_service_that_is_away_is_waited_for_but_not_for_ever(edge: Edge) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    told: list[str] = []
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        edge.trainer(url=url, patience_seconds=1.5).fit(MODEL, step(report=lambda fraction, text: told.append(text)))
    assert "waits for the edge's service" in told
    assert time.monotonic() - begun < 20


class Rubbish(BaseHTTPRequestHandler):
    """Answer every call with what the server's `answer` is."""

    def do_POST(self) -> None:  # http.server calls it so
        self.rfile.read(int(self.headers["Content-Length"]))
        body: bytes = vars(self.server)["answer"]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        (b"<html>hello</html>", "does not answer as a model store does"),
        (b'{"jsonrpc": "2.0", "id": 1, "result": "fine"}', "does not answer as a coordinator does"),
        (b'{"jsonrpc": "2.0", "id": 1, "result": {"job_id": "x", "state": "asleep"}}', r"\(state: Input should be"),
        (b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "no such method"}}', "no such method"),
        (b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -32003, "message": "not you"}}', "not you"),
    ],
)
def test_what_is_no_coordinator_is_told(edge: Edge, answer: bytes, trouble: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rubbish)
    vars(server)["answer"] = answer
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        trainer = edge.trainer(url=f"http://127.0.0.1:{server.server_port}", patience_seconds=0.5)
        with pytest.raises(FedChordError, match=trouble):
            trainer.begin_job(step(0), build=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        (None, "edge.toml cannot be read"),
        ("url = ", "edge.toml is not valid TOML"),
        ("", "url: Field required"),
        ('url = "http://127.0.0.1:1"\nrounds = 0', "rounds: Input should be greater than or equal to 1"),
        ('url = "http://127.0.0.1:1"\nround = 2', "round: Extra inputs are not permitted"),
        ('url = "ftp://127.0.0.1"', "edge.toml is not valid: "),
        ('url = "http://user:pw@127.0.0.1"', "edge.toml is not valid: "),
    ],
)
def test_a_mistake_in_edge_toml_is_a_refusal_that_names_it(
    edge: Edge, tmp_path: Path, text: str | None, trouble: str
) -> None:
    if text is not None:
        (tmp_path / "edge.toml").write_text(text)
    with pytest.raises(Declined, match=trouble):
        EdgeTrainer(edge.context(data=tmp_path))


def test_no_file_of_a_model_stays_at_the_site(edge: Edge) -> None:
    trainer = edge.trainer()
    trainer.fit(MODEL, step())
    assert list(trainer.context.folder.iterdir()) == []

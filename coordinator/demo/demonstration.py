"""Train on handwritten digits at many sites, compare with centralized and local-only training, leave the results."""

import json
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import coordinator
from common.errors import FedChordError, InvalidInput, JobFailed, NotFound
from common.settings import Settings
from coordinator.demo.children import Child
from coordinator.demo.edges import EDGE_TRAINER_CLASS, Edges, read_shares, running_edges
from coordinator.demo.results import Summary, median_seconds, write_metrics
from coordinator.jobfile import JobSpec, read_job_file
from coordinator.jobs import JobState
from coordinator.model_weights import model_weights
from coordinator.parts import Part, find_parts
from coordinator.progress import JobProgress
from coordinator.services import Services, open_services
from coordinator.stack import lifecycle
from coordinator.stack.wishes import Wishes
from coordinator.states import RoundKind
from coordinator.submitting import submit
from store.database import reading
from store.export import export_single
from store.models import find_models

logger = logging.getLogger(__name__)

DEFAULT_SITES = 10
DEFAULT_ALPHA = 0.5
DEFAULT_SEED = 0
TRAINER_CLASS = "examples.digits.trainer:DigitsTrainer"

_ROOT = Path(coordinator.__file__).parents[1]  # of the source tree, where `examples` lies
_JOB_FILE = Path("examples", "digits", "job.toml")
_OUTPUTS = ("summary.json", "metrics.csv", "accuracy.png", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """What to demonstrate."""

    num_sites: int = DEFAULT_SITES  # of all edges together
    num_edges: int = 0  # 0: the sites are the coordinator's own
    rounds: int | None = None  # None: as many as the example's job file says
    alpha: float = DEFAULT_ALPHA  # of the Dirichlet distribution of classes over sites; small: very different sites
    seed: int = DEFAULT_SEED
    output: Path  # the folder for the results

    @property
    def places(self) -> str:
        """Return how many sites there are, in words."""
        return f"{self.num_sites} sites" + (f" of {self.num_edges} edges" if self.num_edges else "")

    @property
    def is_default_size(self) -> bool:
        """Return whether the promises about accuracy hold."""
        sizes = (self.num_sites, self.num_edges, self.rounds, self.alpha)
        return sizes == (DEFAULT_SITES, 0, None, DEFAULT_ALPHA)


@dataclass(frozen=True, kw_only=True)
class Audience:
    """Who is shown what happens."""

    say: Callable[[str], None]  # tells of a step
    follow: Callable[[Services, str], JobProgress]  # shows a job, by id, until it has ended


def demonstrate(plan: DemoPlan, audience: Audience) -> Summary:
    """Run the whole demonstration; the output folder is written at its end, and nothing is left running in any case.

    Raise JobFailed when the job does not complete.
    """
    started = time.monotonic()
    spec = _job(plan)
    _prepare_output(plan.output)
    with _ended_by_sigterm(), _scratch() as scratch, ExitStack() as children:
        audience.say(f"Splitting the handwritten digits over {plan.num_sites} sites (Dirichlet {plan.alpha:g}) …")
        data = _split(plan, scratch / "data")
        starting = time.monotonic()
        with _federation(scratch, plan, spec, data, audience) as (services, edges):
            submitted = time.monotonic()
            progress = audience.follow(services, submit(services, spec).job_id)
            ended = time.monotonic()
            if progress.job.state is not JobState.COMPLETED:
                raise JobFailed(f"The demonstration's job is {progress.job.state}: {progress.job.reason}")
            models = _export_models(services, progress, scratch)
            write_metrics(scratch / "metrics.csv", progress, _parts(services, progress))
            shares = read_shares(services, progress, edges) if edges is not None else ()
            audience.say("Training the same network centralized, and at each site alone, to compare with …")
            measuring = children.enter_context(_measure(plan, spec, data, models))
        measured = measuring.result()  # went on while the stack stopped
        accuracies = [measured["model_accuracies"][model.name] for model in models]
        _draw(scratch, measured, accuracies, title=f"Digits at {plan.places}, Dirichlet {plan.alpha:g}")
        summary = Summary(
            sites=plan.num_sites,
            edges=plan.num_edges,
            rounds=progress.rounds_done,
            federated_accuracy=accuracies[-1],
            centralized_accuracy=measured["centralized_accuracy"],
            local_only_accuracy_mean=measured["local_only_accuracy_mean"],
            seconds_total=time.monotonic() - started,
            seconds_per_round_median=median_seconds(progress, RoundKind.TRAIN),
            seconds_per_test_round_median=median_seconds(progress, RoundKind.TEST),
            seconds_to_start=submitted - starting,
            seconds_federated=ended - submitted,
            alpha=plan.alpha,
            seed=plan.seed,
            job_id=progress.job.job_id,
            shares=shares,
        )
        (scratch / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", "utf-8")
        models[-1].replace(scratch / "model.safetensors")
        for name in _OUTPUTS:
            shutil.move(scratch / name, plan.output / name)
    return summary


def _job(plan: DemoPlan) -> JobSpec:
    """Return the example's job, in the demonstration's size."""
    file = _ROOT / _JOB_FILE
    if not file.is_file():
        raise NotFound(f"There is no {file}: the demonstration runs from a source tree of FedChord, by `make demo`.")
    spec = read_job_file(file)
    changes = {"rounds": plan.rounds or spec.rounds, "seed": plan.seed, "test_every": 1}
    changes["min_sites"] = plan.num_edges or plan.num_sites
    return spec.model_copy(update=changes)


def _prepare_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"--output: {folder} is not a folder; choose another one.")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that everything is stopped."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _scratch() -> Iterator[Path]:
    """Lend a temporary folder; after an error it stays, for its logs tell more."""
    folder = Path(tempfile.mkdtemp(prefix="fedchord-demo-"))
    logs = folder / "stack" / "logs"
    keep = False
    try:
        yield folder
    except FedChordError:
        keep = logs.exists()
        raise
    finally:
        if keep:
            logger.warning("The logs are kept in %s.", logs, extra={"action": "keep_demo"})
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _federation(
    scratch: Path, plan: DemoPlan, spec: JobSpec, data: Path, audience: Audience
) -> Iterator[tuple[Services, Edges | None]]:
    """Run a coordinator whose sites have the data, or one whose sites are edges that have the sites."""
    with ExitStack() as running:
        edges, trainer = None, TRAINER_CLASS
        if plan.num_edges:
            audience.say(f"Starting {plan.num_edges} edges, each with its own coordinator, HTTP service and sites …")
            edges = running.enter_context(
                running_edges(
                    scratch,
                    num_edges=plan.num_edges,
                    data=data,
                    sites=[f"site-{number}" for number in range(1, plan.num_sites + 1)],
                    trainer=spec.trainer,
                    trainer_class=TRAINER_CLASS,
                    code=_ROOT,
                )
            )
            trainer = EDGE_TRAINER_CLASS
        audience.say(f"Starting Valkey, the coordinator and {plan.num_edges or plan.num_sites} sites …")
        wishes = Wishes(
            trainers={spec.trainer: trainer}, site_data=edges.site_data if edges else data, working_folder=_ROOT
        )
        yield running.enter_context(_stack(scratch / "stack", wishes)), edges


@contextmanager
def _stack(folder: Path, wishes: Wishes) -> Iterator[Services]:
    """Run an embedded stack for the length of the block."""
    try:
        with open_services(Settings.load(lifecycle.up(folder, wishes).settings_file)) as services:
            yield services
    finally:
        with lifecycle.undisturbed(), suppress(NotFound):  # there is no stack when it could not even be planned
            lifecycle.down(folder)


def _split(plan: DemoPlan, folder: Path) -> Path:
    arguments = ["--sites", str(plan.num_sites), "--alpha", str(plan.alpha), "--seed", str(plan.seed)]
    with Child("examples.digits.partition", [*arguments, "--folder", folder], folder=_ROOT) as splitting:
        splitting.output()
    return folder


def _export_models(services: Services, progress: JobProgress, scratch: Path) -> list[Path]:
    """Download the global model of every round; return the files in the order of the rounds."""
    folder = scratch / "models"
    folder.mkdir()
    with reading(services.engine) as connection:
        found = find_models(connection, job_id=progress.job.job_id, kind="global", newest_first=False)
    files = []
    for model in found:
        files.append(folder / f"round-{model.round}.safetensors")
        export_single(services.blobs, model_weights(services.blobs, model), files[-1])
    return files


def _parts(services: Services, progress: JobProgress) -> Mapping[str, Sequence[Part]]:
    with reading(services.engine) as connection:
        return {each.round_id: find_parts(connection, each.round_id) for each in progress.rounds}


def _measure(plan: DemoPlan, spec: JobSpec, data: Path, models: Sequence[Path]) -> Child:
    """Begin to measure, on the held-out digits, every model and what it is compared with."""
    arguments: list[str | Path] = ["--folder", data, "--rounds", str(spec.rounds), "--seed", str(plan.seed), "--json"]
    for model in models:
        arguments += ["--model", model]
    return Child("examples.digits.baselines", arguments, folder=_ROOT)


def _draw(scratch: Path, measured: Mapping[str, Any], accuracies: Sequence[float], *, title: str) -> None:
    values = {
        "title": title,
        "rounds": list(range(1, len(accuracies) + 1)),
        "federated": accuracies,
        "centralized": measured["centralized_accuracy"],
        "local_only": measured["local_only_accuracy_mean"],
    }
    (scratch / "chart.json").write_text(json.dumps(values), "utf-8")
    with Child("coordinator.demo.chart", [scratch / "chart.json", scratch / "accuracy.png"], folder=_ROOT) as drawing:
        drawing.output()

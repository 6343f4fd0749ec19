"""Run the demonstration's edges, each a stack of its own, and read who trained what."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput, NotFound
from common.settings import Settings
from coordinator.parts import Part, find_parts
from coordinator.progress import JobProgress
from coordinator.services import Services
from coordinator.stack import lifecycle
from coordinator.stack.wishes import Wishes
from coordinator.states import RoundKind
from store.client import Api
from store.database import reading

EDGE_TRAINER_CLASS = "worker.edge:EdgeTrainer"  # on the lists of the centre's sites, in place of the real trainer

_METRIC = "accuracy"
_MOST_JOBS = 1000


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one place had to do with the final model."""

    name: str
    num_examples: int  # that it trained on in the last round
    accuracy: float | None  # of the final model on its own test digits
    sites: tuple["Share", ...] = ()  # of an edge


@dataclass(frozen=True, kw_only=True)
class Edges:
    """Edges that run."""

    folders: Mapping[str, Path]  # of each edge's stack, by name
    site_data: Path  # makes them the sites of a centre


@contextmanager
def running_edges(
    folder: Path, *, num_edges: int, data: Path, sites: Sequence[str], trainer: str, trainer_class: str, code: Path
) -> Iterator[Edges]:
    """Run the edges for the length of the block, the sites with their data dealt out to them in order."""
    if len(sites) < num_edges:
        raise InvalidInput(
            f"--edges: {len(sites)} sites cannot be {num_edges} edges; give every edge one site at least."
        )
    members = {
        f"edge-{number + 1}": sites[len(sites) * number // num_edges : len(sites) * (number + 1) // num_edges]
        for number in range(num_edges)
    }
    edges = Edges(folders={name: folder / name / "stack" for name in members}, site_data=folder / "centre-data")

    def start(name: str) -> None:
        own = folder / name / "data"
        own.mkdir(parents=True)
        for site in members[name]:
            (own / site).symlink_to(data / site, target_is_directory=True)
        wishes = Wishes(
            num_coordinators=1,  # all edges share this machine
            trainers={trainer: trainer_class},
            site_data=own,
            working_folder=code,
        )
        url = lifecycle.up(edges.folders[name], wishes).http
        (edges.site_data / name).mkdir(parents=True)
        lines = [f"url = {json.dumps(url)}", f"min_sites = {len(members[name])}"]
        (edges.site_data / name / "edge.toml").write_text("\n".join(lines) + "\n", "utf-8")

    def stop(name: str) -> None:
        with suppress(NotFound):  # there is no stack when it could not even be planned
            lifecycle.down(edges.folders[name])

    with ThreadPoolExecutor(num_edges, thread_name_prefix="edge") as pool:
        try:
            list(pool.map(start, members))
            yield edges
        finally:
            with lifecycle.undisturbed():
                pool.shutdown(wait=True, cancel_futures=True)  # whoever still starts is waited for
                with ThreadPoolExecutor(num_edges) as stopping:
                    list(stopping.map(stop, members))


def read_shares(services: Services, progress: JobProgress, edges: Edges) -> tuple[Share, ...]:
    """Return what each edge and each of its sites had to do with the final model of the centre's job."""
    trained, tested = (_last_parts(services, progress, kind) for kind in (RoundKind.TRAIN, RoundKind.TEST))
    return tuple(
        Share(
            name=name,
            num_examples=trained[name].num_examples or 0,
            accuracy=tested[name].metrics.get(_METRIC) if name in tested else None,
            sites=_sites(folder, progress.job.job_id),
        )
        for name, folder in edges.folders.items()
        if name in trained
    )


def _last_parts(services: Services, progress: JobProgress, kind: RoundKind) -> dict[str, Part]:
    rounds = [each for each in progress.rounds if each.kind is kind]
    if not rounds:
        return {}
    with reading(services.engine) as connection:
        return {part.site: part for part in find_parts(connection, rounds[-1].round_id)}


def _sites(folder: Path, job_id: str) -> tuple[Share, ...]:
    """Ask the edge's own service what its sites did in the last jobs that the centre's job was there."""
    with Api(f"http://127.0.0.1:{Settings.load(folder / 'fedchord.toml').http_port}") as api:
        trained, tested = (_last_job(api, f"{job_id}.{kind}.", kind) for kind in ("train", "test"))
    return tuple(
        Share(
            name=name,
            num_examples=part["num_examples"] or 0,
            accuracy=tested[name]["metrics"].get(_METRIC) if name in tested else None,
        )
        for name, part in trained.items()
    )


def _last_job(api: Api, key: str, kind: str) -> dict[str, Any]:
    """Return the parts, by site, of the newest job whose key begins so."""
    job = next((job for job in api.call("job.list", limit=_MOST_JOBS) if (job["key"] or "").startswith(key)), None)
    if job is None:
        return {}
    rounds = [each for each in api.call("job.get", job_id=job["job_id"])["rounds"] if each["kind"] == kind]
    return {part["site"]: part for part in rounds[-1]["parts"]} if rounds else {}

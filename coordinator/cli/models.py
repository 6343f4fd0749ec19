"""The commands `models` and `download`."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from common.errors import InvalidInput, NotFound
from coordinator.cli.output import (
    console,
    document,
    json_option,
    metrics_text,
    open_coordinator,
    print_json,
    table,
)
from coordinator.jobs import find_job
from coordinator.services import Services
from store.blobs import disk_errors
from store.database import reading
from store.export import export_single, export_weights
from store.index import Weights
from store.models import Lineage, ModelInfo, find_model, find_models, latest_model, lineage
from store.weights import load_index

_MEGABYTE = 10**6


@click.command(
    epilog="""\b
Example:
  fedchord models --job 3f9a --kind global
  fedchord models 0c2b --json"""
)
@click.argument("model_id", required=False)
@click.option("--job", "job_id", help="Only the models of this job.")
@click.option("--kind", help="Only models of this kind: initial, update, global, moments.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, the newest.")
@json_option
@click.pass_obj
def models(
    config: Path | None, model_id: str | None, job_id: str | None, kind: str | None, limit: int, as_json: bool
) -> None:
    """List the models, or show one with its lineage.

    MODEL_ID and the job's id may be shortened to what is unique.
    """
    with open_coordinator(config, needs_broker=False) as services:
        if model_id is not None:
            _show(services, model_id, as_json=as_json)
            return
        with reading(services.engine) as connection:
            job_id = find_job(connection, job_id).job_id if job_id is not None else None
            found = find_models(connection, job_id=job_id, kind=kind, limit=limit)
    if as_json:
        print_json([_document(model) for model in found])
        return
    columns = ["MODEL", "STORE", "KIND", "ROUND", "SITE", "STATE", "MB", "EXAMPLES", "METRICS", "CREATED"]
    console().print(table(columns, map(_row, found), empty="There are no models."))


@click.command(
    epilog="""\b
Example:
  fedchord download 0c2b
  fedchord download --job 3f9a --output digits.safetensors"""
)
@click.argument("model_id", required=False)
@click.option("--job", "job_id", help="Take the newest global model of this job.")
@click.option(
    "--output",
    "-o",
    "target",
    type=click.Path(path_type=Path),
    help="The file, or the folder with --shards.  [default: model.safetensors, or model]",
)
@click.option("--shards", is_flag=True, help="Write a folder of shards with an index, as Hugging Face names them.")
@click.option("--force", is_flag=True, help="Write over what is there.")
@json_option
@click.pass_obj
def download(
    config: Path | None,
    model_id: str | None,
    job_id: str | None,
    target: Path | None,
    shards: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model to a safetensors file.

    Ids may be shortened to what is unique.
    """
    if (model_id is None) == (job_id is None):
        raise InvalidInput("Name a model, or a job with --job.")
    target = target or Path("model" if shards else "model.safetensors")
    if target.exists() and not force and not (shards and target.is_dir() and not any(target.iterdir())):
        raise InvalidInput(f"{target} is there already; choose another --output, or --force to write over it.")
    with open_coordinator(config, needs_broker=False) as services:
        model = _find(services, model_id) if model_id is not None else _newest(services, job_id or "")
        files = _export(services, model, target, shards=shards)
    if as_json:
        print_json({"model": _document(model), "files": files})
    else:
        size = sum(file.stat().st_size for file in files) / _MEGABYTE
        click.echo(f"Wrote {model.model_description or model.model_id} to {target} ({size:.2f} MB).")


def _export(services: Services, model: ModelInfo, target: Path, *, shards: bool) -> list[Path]:
    """Write the model to the file or, as shards, to the folder; return the files."""
    weights = load_index(services.blobs, model.model_hash)
    with disk_errors(target.parent):
        if shards:
            return _export_shards(services, weights, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        export_single(services.blobs, weights, target)
        return [target]


def _export_shards(services: Services, weights: Weights, folder: Path) -> list[Path]:
    """Write all files beside their places, then put each in its place: after an error none of them is there."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
            written = export_weights(services.blobs, weights, Path(temporary))
            return [file.replace(folder / file.name) for file in written]
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _show(services: Services, model_id: str, *, as_json: bool) -> None:
    model = _find(services, model_id)
    with reading(services.engine) as connection:
        origin = lineage(connection, model.model_id)
    if as_json:
        print_json({**_document(model), "lineage": _lineage_document(origin)})
        return
    for name, value in _document(model).items():
        if value not in (None, "", [], {}):
            click.echo(f"{name:<18} {metrics_text(value) if isinstance(value, dict) else value}")
    rows = [
        (each["model_id"][:8], each["kind"] or "(deleted)", each["round"], each["site"], _short(each["parents"]))
        for each in _lineage_document(origin)
    ]
    click.echo("\nIt comes of:")
    console().print(table(["MODEL", "KIND", "ROUND", "SITE", "MADE FROM"], rows, empty=""))


def _find(services: Services, model_id: str) -> ModelInfo:
    with reading(services.engine) as connection:
        return find_model(connection, model_id)


def _newest(services: Services, job_id: str) -> ModelInfo:
    with reading(services.engine) as connection:
        job = find_job(connection, job_id)
        found = latest_model(connection, job_id=job.job_id, kind="global")
    if found is None:
        raise NotFound(f"Job {job.name} ({job.job_id}) has no global model yet; `fedchord watch` it.")
    return found


def _document(model: ModelInfo) -> dict[str, object]:
    return {**document(model), "model_state": model.model_state.name}


def _lineage_document(origin: Lineage) -> list[dict[str, Any]]:
    """Return every model of the lineage once, with its parents' ids: nested, it would be deeper than readers take."""
    return [
        {
            "model_id": each.model_id,
            "kind": each.model.model_kind if each.model else None,
            "round": each.model.round if each.model else None,
            "site": each.model.site if each.model else None,
            "parents": [parent.model_id for parent in each.parents],
        }
        for _, each in origin.walk()
        if each.followed
    ]


def _short(model_ids: Sequence[str]) -> str:
    return " ".join(model_id[:8] for model_id in model_ids) or "-"


def _row(model: ModelInfo) -> tuple[object, ...]:
    return (
        model.model_id[:8],
        model.store,
        model.model_kind,
        model.round,
        model.site,
        model.model_state.name.lower(),
        f"{model.model_size / _MEGABYTE:.3g}",
        model.num_examples,
        metrics_text(model.metrics),
        model.created_at,
    )

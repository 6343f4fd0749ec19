"""The group `models`: what is in the model stores, here or at a service elsewhere."""

from pathlib import Path
from typing import Any

import click

from common.errors import InvalidInput
from coordinator.cli.groups import ListingGroup
from coordinator.cli.keep import keep
from coordinator.cli.lineage_view import draw_lineage
from coordinator.cli.model_search import STATES, find_model, find_models, newest_of_job
from coordinator.cli.output import console, json_option, metrics_text, print_json, size_text, table
from coordinator.cli.reach import client_settings, reach, url_option
from coordinator.cli.transfers import fetch_file, fetch_shards, reading_file
from store.models import ModelState
from store.putting import parse_meta

_COLUMNS = ("MODEL", "STORE", "KIND", "ROUND", "SITE", "STATE", "SIZE", "EXAMPLES", "METRICS", "CREATED")

_store_option = click.option("--store", "ddc", metavar="DDC", help="Look in this model store only.")


@click.group(
    cls=ListingGroup,
    epilog="""\b
Example:
  fedchord models
  fedchord models show 0c2b""",
)
def models() -> None:
    """List, show, put, get, keep and delete models.

    Without a command: list them. A model's id may be shortened to what is unique.
    """


@models.command(
    name="list",
    epilog="""\b
Example:
  fedchord models list --job 3f9a --kind global
  fedchord models list --store ddc:digits --state feedbacked --url http://127.0.0.1:8790""",
)
@_store_option
@click.option("--job", help="Only the models of the job whose id begins so.")
@click.option("--kind", help="Only models of this kind; a job makes initial, update, global, moments, optimizer.")
@click.option("--state", type=click.Choice(list(STATES), case_sensitive=False), help="Only models in this state.")
@click.option("--round", type=click.IntRange(0), help="Only models of this round of their job.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, the newest.")
@url_option
@json_option
@click.pass_obj
def list_(
    config: Path | None,
    ddc: str | None,
    job: str | None,
    kind: str | None,
    state: str | None,
    round: int | None,
    limit: int,
    url: str | None,
    as_json: bool,
) -> None:
    """List the models, the newest first."""
    with reach(config, url) as api:
        found = find_models(api, ddc=ddc, job=job, kind=kind, state=state, round=round, limit=limit)
    if as_json:
        print_json(found)
    else:
        console().print(table(_COLUMNS, map(_row, found), empty="There are no models."))


@models.command(
    epilog="""\b
Example:
  fedchord models show 0c2b --json"""
)
@click.argument("model_id")
@_store_option
@url_option
@json_option
@click.pass_obj
def show(config: Path | None, model_id: str, ddc: str | None, url: str | None, as_json: bool) -> None:
    """Show a model, with the names, shapes and types of its tensors."""
    with reach(config, url) as api:
        model = find_model(api, model_id, ddc)
        model = api.get_model_info(model["model_store_ddc"], model["model_id"])
    if as_json:
        print_json(model)
        return
    tensors = model.pop("tensors", None) or {}
    for name, value in model.items():
        if value not in (None, "", [], {}) and value is not False and name != "shards":
            click.echo(f"{name:<18} {_field(name, value)}")
    if tensors:
        rows = [(name, each["dtype"], ", ".join(map(str, each["shape"]))) for name, each in tensors.items()]
        console().print("", table(["TENSOR", "TYPE", "SHAPE"], rows, empty=""))


@models.command(
    epilog="""\b
Example:
  fedchord models put ddc:digits digits.safetensors --kind global --aggregated
  fedchord models put ddc:digits weights.h5 --meta '{"epochs": 3}' --url http://127.0.0.1:8790"""
)
@click.argument("ddc")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--kind", default="", help="What kind of model it is, in a word of yours.")
@click.option("--description", default="", help="A sentence for people.")
@click.option("--meta", default="{}", help="Whatever is to be kept with it: a JSON object.")
@click.option("--aggregated", is_flag=True, help="It is made of other models: `store transfer` takes it down.")
@click.option("--round", type=click.IntRange(0), default=0, show_default=True, help="The round that made it.")
@click.option("--parent", "parents", multiple=True, metavar="ID", help="A model it was made from; can be repeated.")
@click.option("--examples", type=click.IntRange(0), help="How many examples it was trained on.")
@url_option
@json_option
@click.pass_obj
def put(
    config: Path | None,
    ddc: str,
    file: Path,
    kind: str,
    description: str,
    meta: str,
    aggregated: bool,
    round: int,
    parents: tuple[str, ...],
    examples: int | None,
    url: str | None,
    as_json: bool,
) -> None:
    """Put a file into a model store.

    Any file can be a model. Of a safetensors file the tensors are known, too, and a job can start from it.
    """
    model_meta = parse_meta(meta, client_settings(config), name="--meta")
    with reach(config, url) as api:
        put_it = api.put_aggregated_model if aggregated else api.put_model
        model_parents = [find_model(api, parent)["model_id"] for parent in parents]
        with reading_file(file) as content:
            model = put_it(
                ddc,
                content,
                model_kind=kind,
                model_description=description,
                model_meta=model_meta,
                round=round,
                parents=model_parents,
                num_examples=examples,
            )
    if as_json:
        print_json(model)
    else:
        click.echo(f"Put {file} into {ddc} as model {model['model_id']} ({size_text(model['model_size'])}).")


@models.command(
    epilog="""\b
Example:
  fedchord models get 0c2b
  fedchord models get --job 3f9a --output digits.safetensors"""
)
@click.argument("model_id", required=False)
@click.option("--job", help="Take the newest global model of the job whose id begins so.")
@_store_option
@click.option(
    "--output",
    "-o",
    "target",
    type=click.Path(path_type=Path),
    help="The file, or the folder with --shards.  [default: model.safetensors, model.bin for a file without tensors, "
    "or model]",
)
@click.option("--shards", is_flag=True, help="Write a folder of shards with an index, as Hugging Face names them.")
@click.option("--force", is_flag=True, help="Write over what is there.")
@url_option
@json_option
@click.pass_obj
def get(
    config: Path | None,
    model_id: str | None,
    job: str | None,
    ddc: str | None,
    target: Path | None,
    shards: bool,
    force: bool,
    url: str | None,
    as_json: bool,
) -> None:
    """Write a model to a file.

    A model of tensors becomes one safetensors file, however many shards it is stored in; any other file comes back as
    it was put. What is written is compared with its digest first, and is there whole or not at all.
    """
    if (model_id is None) == (job is None):
        raise InvalidInput("Name a model, or a job with --job.")
    with reach(config, url) as api:
        model = find_model(api, model_id, ddc) if model_id is not None else newest_of_job(api, job or "")
        suffix = ".safetensors" if model["index_hash"] else ".bin"
        target = target or Path("model" if shards else f"model{suffix}")
        _check_target(target, shards=shards, force=force)
        files = fetch_shards(api, model, target) if shards else fetch_file(api, model, target)
    if as_json:
        print_json({"model": model, "files": files})
    else:
        click.echo(
            f"Wrote {model['model_description'] or model['model_id']} to {target} ({size_text(model['model_size'])})."
        )


@models.command(
    epilog="""\b
Example:
  fedchord models delete 0c2b"""
)
@click.argument("model_id")
@_store_option
@url_option
@json_option
@click.pass_obj
def delete(config: Path | None, model_id: str, ddc: str | None, url: str | None, as_json: bool) -> None:
    """Forget a model.

    Models that were made from it stay, and so does the one that a running job goes on from.
    """
    with reach(config, url) as api:
        model = find_model(api, model_id, ddc)
        api.delete_model(model["model_store_ddc"], model["model_id"])
    if as_json:
        print_json({"model_id": model["model_id"], "model_store_ddc": model["model_store_ddc"], "deleted": True})
    else:
        click.echo(f"Deleted {model['model_id']} of {model['model_store_ddc']}.")


@models.command(
    epilog="""\b
Example:
  fedchord models lineage 0c2b"""
)
@click.argument("model_id")
@_store_option
@url_option
@json_option
@click.pass_obj
def lineage(config: Path | None, model_id: str, ddc: str | None, url: str | None, as_json: bool) -> None:
    """Show what a model was made from, back to the first.

    The tree has a branch for each job, in it one for each round, and there the updates of the sites. With --json every
    model stands once in one list, with its parents' ids.
    """
    with reach(config, url) as api:
        model = find_model(api, model_id, ddc)
        origin = api.get_lineage(model["model_store_ddc"], model["model_id"])
    if as_json:
        print_json(origin)
    else:
        console().print(draw_lineage(origin))


def _check_target(target: Path, *, shards: bool, force: bool) -> None:
    """Raise InvalidInput where something is in the way."""
    if target.is_dir() if not shards else target.exists() and not target.is_dir():
        raise InvalidInput(f"{target} is a {'file' if shards else 'folder'}; choose another --output.")
    if target.exists() and not force and not (shards and not any(target.iterdir())):
        raise InvalidInput(f"{target} is there already; choose another --output, or --force to write over it.")


def _field(name: str, value: Any) -> object:
    if name == "model_state":
        return f"{ModelState(value).name.lower()} ({value})"
    if name == "model_size":
        return f"{value} bytes"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return metrics_text(value) if isinstance(value, dict) else value


def _state_text(model: dict[str, Any]) -> str:
    """Return the model's state, and whether it is kept or has expired; an older service says neither."""
    marks = [mark for mark, name in (("kept", "kept"), ("expired", "expired_at")) if model.get(name)]
    return ", ".join([ModelState(model["model_state"]).name.lower(), *marks])


def _row(model: dict[str, Any]) -> tuple[object, ...]:
    return (
        model["model_id"][:8],
        model["model_store_ddc"],
        model["model_kind"],
        model["round"],
        model["site"],
        _state_text(model),
        size_text(model["model_size"]),
        model["num_examples"],
        metrics_text(model["metrics"]),
        model["created_at"],
    )


models.add_command(keep)

"""What the federated model is compared with, by the same trainer and for as many epochs.

    python -m examples.digits.baselines --folder digits-data --rounds 20 --seed 0 --json

The folder is one that `examples.digits.partition` wrote; with --model FILE.safetensors that model is measured too.
"""

import json
import statistics
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from common.errors import FedChordError
from examples.digits.partition import Examples
from examples.digits.trainer import DigitsTrainer, read_examples
from store.tensors import read_tensors
from worker.trainer import JobContext, RoundContext, Tensors, derive_seed

HELDOUT = "heldout.npz"
JOB_FILE = Path(__file__).with_name("job.toml")


def centralized_accuracy(folder: Path, *, config: Mapping[str, Any], rounds: int, seed: int) -> float:
    """Return the held-out accuracy of a model trained on all sites' training examples pooled."""
    parts = [Examples.load(file) for file in sorted(folder.glob("*/train.npz"))]
    with tempfile.TemporaryDirectory() as pooled:
        Examples(
            images=np.concatenate([part.images for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
        ).save(Path(pooled) / "train.npz")
        return _train_alone("all", Path(pooled), folder / HELDOUT, config=config, rounds=rounds, seed=seed)


def local_only_accuracies(folder: Path, *, config: Mapping[str, Any], rounds: int, seed: int) -> dict[str, float]:
    """Return, by site, the held-out accuracy of a model trained on that site's examples alone."""
    return {
        file.parent.name: _train_alone(
            file.parent.name, file.parent, folder / HELDOUT, config=config, rounds=rounds, seed=seed
        )
        for file in sorted(folder.glob("*/train.npz"))
    }


def model_accuracy(folder: Path, tensors: Tensors, *, config: Mapping[str, Any]) -> float:
    """Return the held-out accuracy of a model."""
    return _measure(_make_trainer("all", folder, config=config, seed=0), tensors, folder / HELDOUT)


def _train_alone(name: str, data: Path, heldout: Path, *, config: Mapping[str, Any], rounds: int, seed: int) -> float:
    """Train as many epochs as the federation does, in one go; return the held-out accuracy."""
    epochs = rounds * int(config.get("local_epochs", 1))
    trainer = _make_trainer(name, data, config={**config, "local_epochs": epochs}, seed=seed)
    fit = trainer.fit(trainer.build(), RoundContext(round=1, seed=derive_seed(seed, 1, name)))
    return _measure(trainer, fit.tensors, heldout)


def _make_trainer(name: str, data: Path, *, config: Mapping[str, Any], seed: int) -> DigitsTrainer:
    context = JobContext(
        site=name,
        job_id="baseline",
        job_name="baseline",
        trainer="digits-mlp",
        config=config,
        seed=seed,
        data=data,
        folder=data,
    )
    return DigitsTrainer(context)


def _measure(trainer: DigitsTrainer, tensors: Tensors, heldout: Path) -> float:
    evaluation = trainer.measure(tensors, read_examples(heldout), RoundContext(round=1, seed=0))
    return evaluation.metrics["accuracy"]


def _read_models(paths: Sequence[Path], folder: Path, config: Mapping[str, Any]) -> dict[str, float]:
    return {path.name: model_accuracy(folder, read_tensors(path), config=config) for path in paths}


@click.command(help="Measure centralized and local-only training on the digits, and models if given.")
@click.option("--folder", required=True, type=click.Path(path_type=Path, exists=True), help="The partitioned digits.")
@click.option("--job", default=JOB_FILE, type=click.Path(path_type=Path, exists=True), help="Job file with [config].")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of the federated run; the job file's unless given.")
@click.option("--seed", type=int, help="Seed of the models; the job file's unless given.")
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path, exists=True), help="To measure too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    folder: Path, job: Path, rounds: int | None, seed: int | None, models: tuple[Path, ...], as_json: bool
) -> None:
    """Print the accuracies on the held-out examples."""
    values = tomllib.loads(job.read_text("utf-8"))
    config: dict[str, Any] = values.get("config", {})
    chosen: dict[str, Any] = {
        "config": config,
        "rounds": rounds or int(values["rounds"]),
        "seed": int(values.get("seed", 0)) if seed is None else seed,
    }
    try:
        local = local_only_accuracies(folder, **chosen)
        results: dict[str, Any] = {
            "centralized_accuracy": centralized_accuracy(folder, **chosen),
            "local_only_accuracy_mean": statistics.fmean(local.values()),
            "local_only_accuracies": local,
            "model_accuracies": _read_models(models, folder, config),
        }
    except FedChordError as error:
        raise click.ClickException(error.message) from error
    if as_json:
        click.echo(json.dumps(results))
        return
    click.echo(f"centralized: {results['centralized_accuracy']:.3f}")
    click.echo(f"local only, mean: {results['local_only_accuracy_mean']:.3f}")
    for name, accuracy in results["model_accuracies"].items():
        click.echo(f"{name}: {accuracy:.3f}")


if __name__ == "__main__":
    main()

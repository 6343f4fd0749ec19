"""Split scikit-learn's handwritten digits over sites, each with its own mix of classes.

    python -m examples.digits.partition --sites 10 --alpha 0.5 --seed 0 --folder digits-data

writes FOLDER/heldout.npz, which no site sees, and FOLDER/site-1/train.npz, FOLDER/site-1/test.npz and so on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HELDOUT_FRACTION = 0.2  # of all examples, stratified by class
LOCAL_TEST_FRACTION = 0.2  # of a site's examples
MIN_EXAMPLES = 10  # that every site has at least
_MAX_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Some digits."""

    images: npt.NDArray[np.float32]  # (examples, 64), pixels from 0 to 1
    labels: npt.NDArray[np.int64]  # (examples,), 0 to 9

    def take(self, indices: npt.NDArray[np.intp]) -> "Examples":
        """Return the examples at the indices."""
        return Examples(images=self.images[indices], labels=self.labels[indices])

    def save(self, path: Path) -> None:
        """Write the examples."""
        np.savez(path, images=self.images, labels=self.labels)

    @classmethod
    def load(cls, path: Path) -> "Examples":
        """Read what `save` wrote."""
        with np.load(path) as file:
            return cls(images=file["images"], labels=file["labels"])


def site_names(num_sites: int) -> list[str]:
    """Return the names of the example's sites."""
    return [f"site-{number}" for number in range(1, num_sites + 1)]


def load_examples() -> Examples:
    """Return all 1797 digits."""
    images, labels = load_digits(return_X_y=True)
    return Examples(images=(images / 16).astype(np.float32), labels=labels.astype(np.int64))


def dirichlet_parts(
    labels: npt.NDArray[np.int64], *, num_parts: int, alpha: float, rng: np.random.Generator
) -> list[npt.NDArray[np.intp]]:
    """Return each part's indices: every class is dealt out by its own draw from Dirichlet(alpha).

    A small alpha gives parts of few classes, a large one parts that are alike. Drawn again until every part has
    MIN_EXAMPLES. Source: Hsu et al., arXiv 1909.06335; the redrawing as in Li et al., arXiv 2102.02079.
    """
    if num_parts < 1 or alpha <= 0 or num_parts * MIN_EXAMPLES > len(labels):
        raise ValueError(
            f"Cannot split {len(labels)} examples into {num_parts} parts with alpha {alpha}: use an alpha above 0 and "
            f"1 to {len(labels) // MIN_EXAMPLES} parts."
        )
    for _ in range(_MAX_DRAWS):
        parts: list[list[npt.NDArray[np.intp]]] = [[] for _ in range(num_parts)]
        for label in np.unique(labels):
            indices = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(rng.dirichlet(np.full(num_parts, alpha)))[:-1] * len(indices)
            for part, piece in zip(parts, np.split(indices, cuts.astype(int)), strict=True):
                part.append(piece)
        if min(sum(map(len, part)) for part in parts) >= MIN_EXAMPLES:
            return [np.sort(np.concatenate(part)) for part in parts]
    raise ValueError(f"No draw gave every part {MIN_EXAMPLES} examples; use fewer sites or a larger alpha.")


def partition(folder: Path, *, num_sites: int, alpha: float, seed: int) -> dict[str, int]:
    """Write the held-out examples and every site's own; return each site's number of training examples."""
    examples = load_examples()
    everything: npt.NDArray[Any] = np.arange(len(examples.labels))
    rest, heldout = train_test_split(
        everything, test_size=HELDOUT_FRACTION, stratify=examples.labels, random_state=seed
    )
    folder.mkdir(parents=True, exist_ok=True)
    examples.take(heldout).save(folder / "heldout.npz")
    rng = np.random.default_rng(seed)
    sizes = {}
    parts = dirichlet_parts(examples.labels[rest], num_parts=num_sites, alpha=alpha, rng=rng)
    for name, part in zip(site_names(num_sites), parts, strict=True):
        own = rng.permutation(rest[part])
        num_test = max(1, round(LOCAL_TEST_FRACTION * len(own)))
        (folder / name).mkdir(exist_ok=True)
        examples.take(own[num_test:]).save(folder / name / "train.npz")
        examples.take(own[:num_test]).save(folder / name / "test.npz")
        sizes[name] = len(own) - num_test
    return sizes


@click.command(help="Split the handwritten digits over sites.")
@click.option("--sites", default=10, show_default=True, type=click.IntRange(1), help="Number of sites.")
@click.option(
    "--alpha", default=0.5, show_default=True, help="Of the Dirichlet distribution; small: few classes a site."
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same files.")
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Where to write.")
def main(sites: int, alpha: float, seed: int, folder: Path) -> None:
    """Split the digits and tell how many training examples each site has."""
    try:
        sizes = partition(folder, num_sites=sites, alpha=alpha, seed=seed)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for name, size in sizes.items():
        click.echo(f"{name}: {size} training examples")


if __name__ == "__main__":
    main()

"""A torch trainer: a small network that reads handwritten digits."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

from worker.torch_trainer import TorchConfig, TorchTrainer


class DigitsConfig(TorchConfig):
    """The [config] of a digits job: what every torch trainer knows, and this."""

    hidden: int = Field(64, ge=1)  # units of the hidden layer


class DigitsTrainer(TorchTrainer):
    """Train a network with one hidden layer on this site's own digits."""

    config: DigitsConfig

    def model(self) -> nn.Module:
        """Return the network: 64 pixels in, 10 classes out."""
        return nn.Sequential(nn.Linear(64, self.config.hidden), nn.ReLU(), nn.Linear(self.config.hidden, 10))

    def train_data(self) -> TensorDataset:
        """Return this site's training examples."""
        return read_examples(self.context.data / "train.npz")

    def test_data(self) -> TensorDataset:
        """Return this site's test examples."""
        return read_examples(self.context.data / "test.npz")


def read_examples(path: Path) -> TensorDataset:
    """Return the file's images, with pixels from 0 to 1, and labels."""
    with np.load(path) as file:
        return TensorDataset(torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]))

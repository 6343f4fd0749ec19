"""A trainer without torch: scikit-learn's logistic regression through the same API."""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss

from examples.digits.partition import Examples
from worker.trainer import Evaluation, Fit, JobContext, RoundContext, Tensors, Trainer, read_config

CLASSES = np.arange(10)


class RegressionConfig(BaseModel):
    """The [config] of a job with this trainer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    local_epochs: int = Field(1, ge=1)  # passes over the site's data in one round
    learning_rate: float = Field(0.05, gt=0)


class DigitsRegression(Trainer):
    """Train a logistic regression on this site's own digits."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.config = read_config(RegressionConfig, context.config)
        self.train = Examples.load(context.data / "train.npz")
        self.test = Examples.load(context.data / "test.npz")

    def build(self) -> Tensors:
        """Return a model that knows nothing: all zero."""
        return {"coef": np.zeros((10, 64), np.float32), "intercept": np.zeros(10, np.float32)}

    def num_examples(self) -> int:
        """Return how many training examples there are."""
        return len(self.train.labels)

    def fit(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Go on from the global model for the local epochs."""
        model = self._model(tensors, seed=step.seed)
        for epoch in range(self.config.local_epochs):
            model.partial_fit(self.train.images, self.train.labels)
            step.report((epoch + 1) / self.config.local_epochs, "training")
        return Fit(tensors={"coef": model.coef_, "intercept": model.intercept_}, num_examples=self.num_examples())

    def evaluate(self, tensors: Tensors, step: RoundContext) -> Evaluation:
        """Return loss and accuracy over the site's test examples."""
        model = self._model(tensors, seed=step.seed)
        loss = log_loss(self.test.labels, model.predict_proba(self.test.images), labels=CLASSES)
        accuracy = model.score(self.test.images, self.test.labels)
        return Evaluation(num_examples=len(self.test.labels), metrics={"loss": loss, "accuracy": accuracy})

    def _model(self, tensors: Tensors, *, seed: int) -> SGDClassifier:
        model = SGDClassifier(
            loss="log_loss", learning_rate="constant", eta0=self.config.learning_rate, random_state=seed % 2**32
        )
        model.partial_fit(self.train.images[:1], self.train.labels[:1], classes=CLASSES)  # makes the arrays
        model.coef_, model.intercept_ = tensors["coef"].copy(), tensors["intercept"].copy()
        return model

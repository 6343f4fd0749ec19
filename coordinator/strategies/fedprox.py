"""FedProx: FedAvg whose sites are held near the global model."""

from typing import Any

from pydantic import Field

from coordinator.strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """Average as FedAvg does; each site adds mu/2 times the squared distance to the global model to its loss.

    Source: Li et al., Federated Optimization in Heterogeneous Networks, arXiv 1812.06127.
    """

    mu: float = Field(0.01, gt=0)  # the proximal term's weight

    def trainer_config(self) -> dict[str, Any]:
        """Ask the trainers for the proximal term."""
        return {"proximal_mu": self.mu}

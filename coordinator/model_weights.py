"""Find the tensors of a recorded model."""

from common.errors import InvalidTensors
from store.blobs import BlobStore
from store.index import Weights
from store.models import ModelInfo
from store.weights import load_index


def model_weights(blobs: BlobStore, model: ModelInfo) -> Weights:
    """Return what the model's tensors are and which blobs hold them; raise InvalidTensors for an opaque file."""
    return load_index(blobs, index_digest(model))


def index_digest(model: ModelInfo) -> str:
    """Return the digest of the index of the model's tensors; raise InvalidTensors for an opaque file."""
    if model.index_hash is None:
        raise InvalidTensors(f"Model {model.model_id} holds no tensors; take one that was put as safetensors.")
    return model.index_hash

"""Carry a torch module's state to numpy and back, to the bit: buffers, integers, bool, bfloat16, float8, 0-d, tied."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import InvalidTensors
from worker.trainer import Tensors

# numpy knows these by ml_dtypes only; torch hands them over as integers of the same width.
_VIEWED: dict[torch.dtype, tuple[torch.dtype, np.dtype[Any]]] = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
    torch.float8_e4m3fnuz: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    torch.float8_e5m2fnuz: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
}
_VIEWED_BACK = {array: (torch_dtype, integer) for torch_dtype, (integer, array) in _VIEWED.items()}


def tensors_of(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return the module's state as arrays; on the processor they share the module's memory."""
    arrays = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise InvalidTensors(
                f"The model's state {name!r} is no tensor and cannot be sent; keep it out of state_dict."
            )
        arrays[name] = to_numpy(value)
    return arrays


def load_tensors(module: nn.Module, tensors: Tensors) -> None:
    """Copy the arrays into the module; raise InvalidTensors unless names, shapes and dtypes are the module's own."""
    state = module.state_dict()
    if missing := sorted(state.keys() - tensors.keys()):
        raise InvalidTensors(
            f"The global model lacks {_some(missing)}, which the trainer's model has; use the same model."
        )
    if unexpected := sorted(tensors.keys() - state.keys()):
        raise InvalidTensors(
            f"The trainer's model lacks {_some(unexpected)}, which the global model has; use the same model."
        )
    with torch.no_grad():
        for name, target in state.items():
            source = to_torch(tensors[name])
            if (source.shape, source.dtype) != (target.shape, target.dtype):
                raise InvalidTensors(
                    f"Tensor {name!r} of the global model is {_describe(source)}, of the trainer's model "
                    f"{_describe(target)}; use the same model."
                )
            target.copy_(source)


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the tensor as an array, which shares its memory where that is possible."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if tensor.is_sparse or tensor.is_quantized:
        raise InvalidTensors(f"A {tensor.layout} tensor of {tensor.dtype} cannot be sent; make it dense.")
    if tensor.dtype in _VIEWED:
        integer, dtype = _VIEWED[tensor.dtype]
        tensor = tensor.contiguous().view(integer)
        return tensor.numpy().view(dtype)
    return tensor.numpy()


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return the array as a tensor, which shares its memory where that is possible."""
    if not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))  # torch has no read-only and no foreign tensors
    if array.dtype in _VIEWED_BACK:
        torch_dtype, integer = _VIEWED_BACK[array.dtype]
        numpy_integer = np.int16 if integer == torch.int16 else np.uint8
        return torch.from_numpy(array.view(numpy_integer)).view(torch_dtype)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise InvalidTensors(f"Arrays of {array.dtype} cannot become torch tensors; convert them.") from error


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown

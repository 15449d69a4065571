"""Tensors of a safetensors file: where each lies, and its values."""

import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from jax_unlearn.models.files import check_file, parse_json, shown

__all__ = ["StoredTensor", "check_float", "read_header", "read_tensor"]

_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INTEGERS = {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}
# Bytes of a header: that of SDXL has 0.3 MB.
_MAX_HEADER = 2**24


class StoredTensor(NamedTuple):
    """Where a tensor lies: its bytes in the file, and what they are."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
      ValueError: if there is no such file, or it is damaged.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"its header has {length} bytes, of {_MAX_HEADER} at most.")
            header = parse_json(file.read(length), "its header")
        # This checks that the header is sound and that its tensors fill the file.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(
                path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start
            )
            for name, entry in header.items()
            for start, end in [entry["data_offsets"]]
        }
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        reason = shown(str(error))
        raise ValueError(f"{path} is damaged, or no safetensors file: {reason}") from error


def check_float(name: str, stored: StoredTensor) -> None:
    """Raises ValueError for a tensor that `read_tensor` does not read."""
    if stored.dtype not in _FLOATS:
        dtype = _INTEGERS.get(stored.dtype, shown(stored.dtype))
        raise ValueError(f"tensor {shown(name)} is of dtype {dtype}: expected a float.")


def read_tensor(name: str, stored: StoredTensor) -> np.ndarray:
    """The values of a tensor as float32.

    They are read and not mapped, since pages of a mapping stay until the last is read.

    Raises:
      ValueError: naming the tensor, if it is not of floats or holds values that are not finite.
    """
    check_float(name, stored)
    values = np.fromfile(stored.path, np.uint8, stored.size, offset=stored.offset)
    with np.errstate(all="ignore"):  # What is beyond float32 becomes infinite, and is refused.
        values = values.view(_FLOATS[stored.dtype]).reshape(stored.shape)
        values = values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError(f"tensor {shown(name)} holds values that are not finite.")
    return values

"""The file that is never written has the bytes of the one that is."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from store.blobs import hash_file
from store.tensors import write_shard
from store.weights import SHARD_METADATA
from worker.tensor_file import TensorFile

TENSORS = {
    "w": np.arange(1000, dtype=np.float32).reshape(10, 100),
    "t": np.arange(1000, dtype=np.float32).reshape(10, 100).T,  # not contiguous
    "big": np.arange(5, dtype=">f8"),
    "half": np.ones(3, ml_dtypes.bfloat16),
    "n": np.array(4, np.int64),
    "none": np.zeros((0, 7), np.float16),
}


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    write_shard(tmp_path / "written", TENSORS, metadata=SHARD_METADATA)
    return (tmp_path / "written").read_bytes()


@pytest.mark.parametrize("size", [1, 7, 100, 4000, 10**6])
def test_it_reads_as_the_written_file_in_pieces_of_any_size(written: bytes, size: int) -> None:
    file = TensorFile(TENSORS)
    assert b"".join(iter(lambda: file.read(size) or b"", b"")) == written
    assert file.size == len(written)


@pytest.mark.parametrize("start", [0, 5, 100, 3000, 8000, 10**6])
def test_it_can_be_read_from_anywhere(written: bytes, start: int) -> None:
    file = TensorFile(TENSORS)
    assert file.seek(start) == start
    assert file.read() == written[start:]
    assert file.seek(-4, os.SEEK_END) == len(written) - 4
    assert (file.read(), file.tell()) == (written[-4:], len(written))
    assert file.seek(-2, os.SEEK_CUR) == len(written) - 2
    with pytest.raises(ValueError, match="nothing before"):
        file.seek(-1)


def test_whoever_watches_can_end_the_reading() -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        TensorFile(TENSORS, on_read=stop).read(10)


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    blob = write_shard(tmp_path / "written", {}, metadata=SHARD_METADATA)
    (tmp_path / "read").write_bytes(TensorFile({}).read() or b"")
    assert hash_file(tmp_path / "read") == blob

"""Files that the safetensors library reads; copies that do not follow what they were made of."""

import errno
import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moa_dist.checkpoint.host_copy import HostCopy
from moa_dist.checkpoint.state_source import Fragment
from moa_dist.checkpoint.tensor_file import TensorSpec, write_tensors

TENSORS = {
    "fp64": torch.randn(3, dtype=torch.float64),
    "fp32": torch.randn(2, 5),
    "bf16": torch.randn(7).bfloat16(),
    "one value": torch.tensor(3.0),
    "empty": torch.zeros(0),
}


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    specs = [TensorSpec(key, t.dtype, tuple(t.shape)) for key, t in TENSORS.items()]
    written = write_tensors(path, specs, TENSORS.values(), {"by": "us"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"by": "us"}
    content = path.read_bytes()
    assert written == (len(content), hashlib.sha256(content).hexdigest())


def test_errors_name_the_file(tmp_path):
    missing = tmp_path / "no/x.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        write_tensors(missing, [], [])
    assert caught.value.filename in (missing, str(missing))
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=str(full)) as caught:
        write_tensors(full, [], [])
    assert caught.value.errno == errno.ENOSPC


def test_a_snapshot_is_a_copy_and_its_memory_is_used_again():
    host = HostCopy(torch.device("cpu"))
    flat = torch.arange(10.0)
    fragments = [
        Fragment("a", "narrow", 0, torch.ones(3, dtype=torch.bfloat16)),  # would misalign the next
        Fragment("a", "master", 4, flat[4:8]),
    ]
    first = host.take(fragments)
    flat.zero_()
    assert [(p.name, p.start, p.spec.key) for p in first.places] == [
        ("a/master", 4, "a/master/4"),
        ("a/narrow", 0, "a/narrow/0"),
    ]
    assert first.values[:16].view(torch.float32).tolist() == [4.0, 5.0, 6.0, 7.0]
    second = host.take(fragments[1:])
    assert second.values.data_ptr() == first.values.data_ptr()
    assert second.values.view(torch.float32).tolist() == [0.0] * 4

"""What we write in the safetensors format is what the library reads and writes."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from memlayers.files import read_tensors, write_tensors
from memlayers.files.safe import NAMES, write_safetensors


def test_every_dtype_and_shape_is_read_by_the_library(tmp_path):
    tensors = {}
    for dtype, name in NAMES.items():
        for shape in ((), (0,), (3, 0, 2), (1,), (3,), (2, 3, 5)):
            tensors[f"ü {name} {shape}"] = (torch.rand(shape) * 3).to(dtype)
    write_safetensors(tmp_path / "x", tensors, {"of": 'mine "quoted"'})
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"of": 'mine "quoted"'}


def test_a_dtype_that_the_format_has_no_name_for(tmp_path):
    with pytest.raises(TypeError, match=r"'x' has numbers of torch\.complex128"):
        write_tensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex128)}, {})
    assert not os.listdir(tmp_path)


def test_what_is_on_no_cpu_or_not_contiguous_or_shared(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"t": whole.T, "row": whole[1], "again": whole, "wide": whole[:1, :1].expand(1, 5)}
    write_tensors(tmp_path / "x", tensors, {})
    found, _ = read_tensors(tmp_path / "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

"""The Triton path of chunk_memory, in a process of its own."""

import pytest

from tests.kernels.interpreted import needs_gpu, run_triton


@pytest.mark.full
def test_triton_interpreted():
    run_triton("triton_chunk_memory.py", interpret=True)


@needs_gpu
@pytest.mark.gpu
def test_triton_gpu():
    run_triton("triton_chunk_memory.py", interpret=False)

import os

# Before anything imports Triton, which looks at it then: its kernels run on CPUs in tests.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors in tests are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)

"""Where a test of the engine runs: on the CPU, and on a CUDA device where there is one.

Kernels alone also run in Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's compiler instantiates an autograd function to trace it, and warns of that itself.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
ON_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
# Where the kernels' operands lie.
KERNEL_DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
# The twin that any device has, and the kernels.
WAYS = ["plain", pytest.param("kernels", marks=ON_KERNELS)]

"""Which errors say that a device's memory is used up."""

import pytest
import torch

from loratune.engine.memory import out_of_memory_reason
from loratune.errors import CapacityError


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it."),
        torch.OutOfMemoryError(""),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be later"),
    ],
)
def test_out_of_memory_is_known_by_its_type_or_by_its_words(error: Exception) -> None:
    assert out_of_memory_reason(error) == str(error).partition("\n")[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        # What somebody else says of memory is no device's.
        CapacityError("the plan is out of memory"),
        OSError("out of memory"),
    ],
)
def test_any_other_error_is_another(error: Exception) -> None:
    assert out_of_memory_reason(error) is None

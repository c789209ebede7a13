"""Lets Triton's interpreter multiply bf16, which it would take for integers."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture
def interpreted_bf16(monkeypatch):
    """Products of bf16 tiles are taken in fp32, as tensor cores do."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def wide(tile):
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        data = interpreter._convert_float(tile.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(data.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)

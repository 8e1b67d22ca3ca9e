"""ONNX for PyTorch operators that the exporter has no rule for."""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset23 as op

# fmt: off
_NEAR = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
         0.246640727, 1.50140941)
_FAR = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
        1.00167406, 2.83297682)
# fmt: on


def erf_inv(x: Any) -> Any:
    """The inverse error function in float32, by M. Giles, "Approximating the erfinv function" (2010), single precision."""
    one, turn, near, far = (op.Constant(value_float=value) for value in (1.0, 5.0, 2.5, 3.0))
    w = op.Neg(op.Log(op.Mul(op.Sub(one, x), op.Add(one, x))))
    inner = _polynomial(_NEAR, op.Sub(w, near))
    outer = _polynomial(_FAR, op.Sub(op.Sqrt(w), far))
    return op.Mul(op.Where(op.Less(w, turn), inner, outer), x)


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    value = op.Constant(value_float=coefficients[0])
    for coefficient in coefficients[1:]:
        value = op.Add(op.Mul(value, x), op.Constant(value_float=coefficient))
    return value


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.prims.erf_inv.default: erf_inv}
"""What `torch.onnx.export` takes as `custom_translation_table`."""

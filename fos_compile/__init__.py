"""Four Over Six NVFP4 training and inference as a torch.compile backend.

``torch.compile(model, backend="fouroversix")`` needs no import of this package. Names are loaded
on first use, so that importing a subpackage (``fos_compile.kernels``) imports none above it.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Backend": "backend",
    "BackendConfig": "config",
    "FosCompileWarning": "passes.errors",
    "OperandSpec": "passes.recipe",
    "QuantizedTensor": "functional",
    "Recipe": "passes.recipe",
    "Report": "passes.report",
    "dequantize": "functional",
    "explain": "explaining",
    "matmul": "functional",
    "quantize": "functional",
    "train_step": "training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'fos_compile' has no attribute {name!r}; it has {', '.join(_HOME)}"
        )
    return getattr(importlib.import_module(f"fos_compile.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

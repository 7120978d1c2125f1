"""Reports on disk beside Inductor's caches: a cache hit skips the passes that make them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fos_compile.passes.report import PassReport, Report, SiteReport


def key(gm: fx.GraphModule, example_inputs: Sequence[Any], uuid: str) -> str:
    """Identity of what the passes see: graph, inputs, autograd and autocast state, our code."""
    state = [
        torch.__version__,
        uuid,
        gm.code,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    ]
    for device in ("cpu", "cuda"):
        state += [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
    state += [_describe(example) for example in example_inputs]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def _describe(example: Any) -> str:
    if isinstance(example, torch.Tensor):
        return f"{example.dtype} {tuple(example.shape)} {example.device} {example.requires_grad}"
    return str(example)


def save(key: str, report: Report) -> None:
    """Write atomically; a machine that cannot write loses nothing but the report of a later hit.

    The report of a failure stays with the process that had it, as does its graph.
    """
    if report.failure:
        return
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                json.dump(dataclasses.asdict(report), file)
                file.close()
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError:
        return


def load(key: str) -> Report | None:
    """The saved report, or None if there is none or it cannot be read."""
    try:
        data = json.loads(_path(key).read_text())
        sites = tuple(SiteReport(**site) for site in data.pop("sites"))
        passes = tuple(
            PassReport(**{**each, "notes": tuple(each["notes"])}) for each in data.pop("passes")
        )
        unused = tuple(data.pop("unused"))
        return Report(sites=sites, passes=passes, unused=unused, **data)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _path(key: str) -> Path:
    return Path(cache_dir()) / "fos_compile" / "reports" / f"{key}.json"

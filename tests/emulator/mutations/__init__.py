"""Single faults planted in NVIDIA's NVFP4 GEMMs: where they are put, and what is changed there."""

from __future__ import annotations

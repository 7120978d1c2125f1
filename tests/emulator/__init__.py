"""A functional emulator of sm_90a, sm_100a and sm_120a PTX on the CPU (docs/emulator.md)."""

from __future__ import annotations

"""Part of the emulator: see tests/emulator/__init__.py."""

from __future__ import annotations

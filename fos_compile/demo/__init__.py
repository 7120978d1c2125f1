"""The demonstration: one small Llama, real text, three recipes."""

from __future__ import annotations

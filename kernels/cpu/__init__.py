"""CPU kernels: one C++ file, built with the machine's compiler on first use (no torch headers).

The eager reference stays the definition; these give the same bits a few dozen times faster, and
without a compiler the reference serves.
"""

from __future__ import annotations

"""The host side: what a CuTe-DSL function does before its kernel starts, done here without CUDA.

``load(compiled)`` turns what ``cute.compile`` returned into a :class:`Host`. That is the very host
code that runs on a GPU, exported as an object file and linked with ``shim.c`` in the place of the
CUDA runtime: it checks arguments, encodes tensor maps, computes the grid and launches. A launch is
recorded (:class:`~tests.emulator.launch.Launch`) rather than run.

How to compile, with options of a call of ``cute.compile``, since the ``CUTE_DSL_*`` environment is
read once, at the import of cutlass:

- ``--gpu-arch sm_100a`` needs no GPU.
- ``--keep-ptx --dump-dir <a private folder>``: the text is then in ``compiled.__ptx__``, read back
  right after compiling. The name of the dumped file holds neither options nor a process, so a
  folder that others write to may give somebody else's kernel.
- ``--generate-line-info`` puts a ``.loc`` before the instructions of every line of the kernel.
- ``--enable-tvm-ffi`` or not: host code with TVM-FFI checks its arguments itself and in full, as
  it does for users. Without it the DSL checks nothing; `arguments` then does it, from placeholders
  that are recorded for everything compiled after the import of this package.
"""

from __future__ import annotations

from tests.emulator.host.program import Host, load

__all__ = ["Host", "load"]

"""Graph rewriting: find the matmuls of a traced model and quantize their operands.

Installed as ``fos_compile.passes``. One pass, one file:

==============  ====================================================================
``detect.py``   names every matmul: module path, role, operands behind views
``decide.py``   a recipe turns a site into a plan or a rejection with a reason
``insert.py``   quantize operators and ``fos::scaled_mm`` in place of planned sites
``share.py``    one quantization per (tensor, orientation, spec); pairs
``lower.py``    after partitioning: keep the device kernel or inline the reference
``report.py``   what happened to every site, as data and as a table
``pipeline.py`` the only place that knows the order
==============  ====================================================================
"""

from __future__ import annotations

if __name__ != "fos_compile.passes":
    raise ImportError(
        f"this package must be imported as 'fos_compile.passes', not as {__name__!r}: the folder "
        "of a checkout is on sys.path; run Python from another folder or set PYTHONSAFEPATH=1"
    )

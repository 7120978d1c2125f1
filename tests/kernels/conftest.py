"""Both implementations of the operators on the CPU, for the modules that test numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fos_compile.kernels.cpu import build


@pytest.fixture(scope="module", params=["kernel", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the module with the C++ kernel and again with the eager reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOS_CPU_KERNEL", str(int(request.param == "kernel")))
        build.library.cache_clear()
        status = build.status()
        if request.param == "kernel" and not status:
            pytest.skip(status.reason)
        assert bool(status) is (request.param == "kernel")
        yield request.param
    build.library.cache_clear()

"""The structure that the design promises: import arrows, cold import, packaging, sizes.

Arrows: benchmarks, tests -> fos_compile -> passes -> kernels -> torch. kernels/*.py may reach
kernels/cute only from inside functions; kernels/cute may use formats, target and errors only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "passes", "fos_compile")
CUTE_MAY_USE = frozenset({"formats", "target", "errors", "cute"})
FILE_LIMIT, DEVICE_FILE_LIMIT, FUNCTION_LIMIT = 400, 700, 60


def _sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _relative(path):
    return path.relative_to(ROOT).as_posix()


def _imports(path):
    """Yield (module, line, inside a function) for every import, TYPE_CHECKING blocks left out."""
    stack = [(ast.parse(path.read_text()), False)]
    while stack:
        node, inside = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend((child, inside) for child in node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{_relative(path)}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{a.name}", node.lineno, inside) for a in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack.extend((child, inside) for child in ast.iter_child_nodes(node))


def _layer(module):
    """Layer of a fos_compile module name; None for the rest of the world."""
    parts = module.split(".")
    if parts[0] != "fos_compile":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "passes") else "fos_compile"


def _upward(path):
    own = LAYERS.index(_relative(path).split("/")[0])
    for module, line, _ in _imports(path):
        layer = _layer(module)
        if layer is not None and LAYERS.index(layer) > own:
            yield f"{_relative(path)}:{line} imports {module}"
        if module.split(".")[0] in ("kernels", "passes", "tests", "benchmarks", "harness"):
            yield f"{_relative(path)}:{line} imports {module}"


def test_imports_point_downward():
    assert not [found for path in _sources(*LAYERS) for found in _upward(path)]


def test_passes_do_not_see_device_code():
    wrong = [
        f"{_relative(path)}:{line} imports {module}"
        for path in _sources("passes")
        for module, line, _ in _imports(path)
        if module.startswith("fos_compile.kernels.cute")
    ]
    assert not wrong


def test_device_code_is_imported_inside_functions_only():
    device = ("fos_compile.kernels.cute", "cutlass", "triton", "cuda")
    wrong = [
        f"{_relative(path)}:{line} imports {module}"
        for path in _sources(*LAYERS)
        if not _relative(path).startswith("kernels/cute/")
        for module, line, inside in _imports(path)
        if not inside and any(f"{module}.".startswith(f"{name}.") for name in device)
    ]
    assert not wrong


def test_device_code_knows_no_operator():
    wrong = [
        f"{_relative(path)}:{line} imports {module}"
        for path in _sources("kernels/cute")
        for module, line, _ in _imports(path)
        if module.startswith("fos_compile.kernels.") and module.split(".")[2] not in CUTE_MAY_USE
    ]
    assert not wrong


def test_the_import_check_sees_violations(tmp_path, monkeypatch):
    """The checks above pass on an empty list, so prove that the list can fill."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "bad.py"
    source.write_text(
        "def f():\n    from fos_compile.passes import detect\nimport fos_compile.api\n"
    )
    assert sorted(_upward(source)) == [
        "kernels/bad.py:2 imports fos_compile.passes.detect",
        "kernels/bad.py:3 imports fos_compile.api",
    ]


def test_cold_import_without_device_libraries():
    """The package imports and quantizes where neither CUTLASS nor Triton exists."""
    program = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("cutlass", "triton", "cuda"):
                    raise ImportError(f"{name} is blocked by the test")

        sys.meta_path.insert(0, Blocked())
        import fos_compile
        assert "torch" not in sys.modules, "import fos_compile must stay lazy"
        import fos_compile.kernels
        import fos_compile.passes
        import torch

        q = fos_compile.quantize(torch.randn(33, 70, dtype=torch.bfloat16))
        assert q.dequantize(torch.float32).shape == (33, 70)
        assert not [m for m in sys.modules if m.startswith("fos_compile.kernels.cute")]
    """
    _run_python(program)


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_top_level_import_is_refused(name):
    """From the repository's root our folders would pose as top-level packages."""
    program = f"""
        import sys

        sys.path.insert(0, {str(ROOT)!r})
        try:
            import {name}
        except ImportError as error:
            assert "fos_compile.{name}" in str(error), error
        else:
            raise AssertionError("{name} was imported as a top-level package")
    """
    _run_python(program)


def _run_python(program):
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_package_is_listed():
    """setuptools finds nothing by itself under the package-dir mapping."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in _sources(*LAYERS)}
    names = {_relative(folder).replace("/", ".") for folder in folders}
    expected = {n if n.split(".")[0] == "fos_compile" else f"fos_compile.{n}" for n in names}
    assert set(settings["packages"]) == expected
    missing = [_relative(f) for f in folders if not (f / "__init__.py").exists()]
    assert not missing, "folders with modules need an __init__.py"


def _functions(tree):
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def _too_long(path):
    text = path.read_text()
    tree = ast.parse(text)
    if "Size:" in (ast.get_docstring(tree) or ""):
        return
    device = _relative(path).startswith("kernels/cute/")
    num_lines = len(text.splitlines())
    if num_lines > (DEVICE_FILE_LIMIT if device else FILE_LIMIT):
        yield f"{_relative(path)}: {num_lines} lines"
    if device:
        return
    for function in _functions(tree):
        length = function.end_lineno - function.lineno + 1
        if length > FUNCTION_LIMIT:
            yield f"{_relative(path)}:{function.lineno} {function.name}: {length} lines"


def test_files_and_functions_stay_small():
    """A file over the limit says why in its module docstring, in a line that begins "Size:"."""
    folders = (*LAYERS, "tests", "benchmarks")
    assert not [found for path in _sources(*folders) for found in _too_long(path)]


def test_future_annotations_everywhere_but_in_device_code():
    missing = [
        _relative(path)
        for path in _sources(*LAYERS, "tests", "benchmarks")
        if not _relative(path).startswith(("kernels/cute/", "tests/emulator/kernels/"))
        and len(ast.parse(path.read_text()).body) > 1  # more than a docstring
        and "from __future__ import annotations" not in path.read_text()
    ]
    assert not missing


def test_sources_are_ascii():
    wrong = [
        _relative(path)
        for path in _sources(*LAYERS, "tests", "benchmarks")
        if not path.read_bytes().isascii()
    ]
    assert not wrong

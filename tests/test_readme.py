"""Every Python example of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_its_three_examples():
    assert len(EXAMPLES) == 3
    assert "train_step" in EXAMPLES[1]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, tmp_path, monkeypatch):
    # Dynamo reads the source of what it traces, so the example is a file.
    path = tmp_path / f"readme_example_{number}.py"
    path.write_text(EXAMPLES[number])
    namespace: dict[str, object] = {"__name__": "readme", "__file__": str(path)}
    exec(compile(EXAMPLES[number], str(path), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing

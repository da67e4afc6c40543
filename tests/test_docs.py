"""README and docs: links, result files, options, and the code that they print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vitlocal.config import SECTIONS, read_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:results|rcfg|tests|vitlocal)/[\w/]+\.(?:json|yaml|py)\b", text))
    made_by_the_reader = {"rcfg/joining.yaml", "vitlocal/methods/joining.py"}
    assert not [name for name in sorted(named - made_by_the_reader) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_a_page_names_exist(page: Path):
    """Every ``--section.option``, and every `section.option` in code style, is an option of the trainer."""
    text, sections = page.read_text(encoding="utf-8"), "|".join(SECTIONS)
    named = set(re.findall(r"--([a-z_]+\.[a-z_]+)\b(?!\.)", text))
    named |= set(re.findall(rf"`((?:{sections})\.(?!yaml|md|py|safetensors|parquet)[a-z_]+)\b(?!\.)", text))
    assert not sorted(named - read_config([], {}).flat().keys())


def test_results_page_has_every_result_file():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert not [path.name for path in sorted((ROOT / "results").glob("*.json")) if path.name not in page]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


def test_loader_example_of_the_readme_runs(folder: Path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("data/mine", str(folder)), names)
    assert names["images"].shape == (64, 3, 48, 48) and names["labels"].shape == (64,)

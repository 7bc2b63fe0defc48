"""Every link between the documents leads somewhere, and nothing was left open in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "qgrid").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [each for each in LINK.findall(text) if "://" not in each]
    assert [each for each in links if not (page.parent / each).exists()] == []
    assert "@@" not in text


def test_every_page_of_docs_is_linked() -> None:
    linked = {
        (page.parent / each).resolve()
        for page in PAGES
        for each in LINK.findall(page.read_text(encoding="utf-8"))
    }
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page not in linked] == []

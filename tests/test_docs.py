"""What the documentation names exists: pages, links, included files and objects. `make docs` builds it in strict mode."""

import importlib
import re
from pathlib import Path

import pytest

import cmoe_kernels

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Written by `python -m docs.pages`, which `make docs` runs.
GENERATED = {"benchmarks", "aot", "sass", "mutants", "roofline"}
PAGES = sorted(path for path in DOCS.rglob("*.md") if not (path.parent.name == "evidence" and path.stem in GENERATED))
IDENTIFIERS = sorted({name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE)})
INCLUDED = {name for page in PAGES for name in re.findall(r'^--8<-- "(.+)"', page.read_text(), flags=re.MULTILINE)}


def navigation():
    # Lines "- Title: page.md" below nav.
    return set(re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))


def resolve(identifier):
    parts = identifier.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(identifier)


def test_navigation_names_pages_that_exist():
    assert "index.md" in navigation()
    written = {page.relative_to(DOCS).as_posix() for page in PAGES} | {f"evidence/{name}.md" for name in GENERATED}
    assert navigation() <= written
    assert written - navigation() == {f"kernels/{name}" for name in INCLUDED if name.endswith(".md")}


def test_included_files_exist():
    assert INCLUDED
    for name in INCLUDED:
        assert (DOCS / "kernels" / name).is_file() or (ROOT / name).is_file(), name


@pytest.mark.each
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\(((?!https?:)[^)#]*)(#([^)]+))?\)", page.read_text()):
        linked = (page.parent / target).resolve() if target else page
        made = linked.parent == DOCS / "evidence" and linked.stem in GENERATED
        assert made or linked.is_file(), f"{page.name} links to {target}"
        if anchor.startswith("#cmoe_kernels"):
            assert f"::: {anchor[1:]}" in linked.read_text(), f"{page.name} links to {target}{anchor}"


@pytest.mark.each
@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_documented_objects_exist_and_have_docstrings(identifier):
    if "integrations" in identifier:
        pytest.importorskip("transformers")
    assert resolve(identifier).__doc__


def test_every_public_name_is_documented():
    documented = {name.rpartition(".")[2] for name in IDENTIFIERS}
    assert set(cmoe_kernels.__all__) <= documented


def test_the_walk_names_files_and_their_lengths():
    """docs/contributing/reading.md, within a tenth."""
    rows = re.findall(r"^\| ([\w/.\\]+) \| (\d+) \|", (DOCS / "contributing" / "reading.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 20
    lengths = {name.replace("\\", ""): int(said) for name, said in rows}
    found = {name: len((ROOT / name).read_text().splitlines()) for name in lengths}
    assert {name: lines for name, lines in found.items() if abs(lines - lengths[name]) > 10 + lines // 10} == {}

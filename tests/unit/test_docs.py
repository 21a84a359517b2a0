"""What the documents say of the code: the table of files is complete, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm_ray.checkpoints.runs import RunPaths, examples_dir, floors_file
from ldm_ray.search.records import SearchPaths

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "docs" / "design.md"
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SOURCES = [ROOT / "Makefile", *(p for folder in ("deploy", "benchmarks") for p in (ROOT / folder).rglob("*"))]
TEXTS = [*DOCUMENTS, *sorted(p for p in SOURCES if p.is_file() and "__pycache__" not in p.parts)]
BASES = ("", "ldm_ray", "tests", "tune", "benchmarks", "tests/unit", "tests/system")  # where a name may begin
FILE = re.compile(r"(?<![\w/.])((?:/home/ray/ldm_ray/)?(?:\w+/)*\w+\.py)\b")
MODULE = re.compile(r"(?<![\w/.\\])ldm_ray((?:\.[a-z]\w*)+)")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]+)?\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def table() -> list[str]:
    """The files that docs/design.md has a line for, in its order."""
    rooms = DESIGN.read_text().split("\n## The rooms\n")[1].split("\n## ")[0]
    names, room = [], ""
    for line in rooms.splitlines():
        if heading := re.match(r"### `(.+/)`: ", line):
            room = heading[1]
        elif row := re.match(r"\| `(\w+\.py)` \| \S", line):
            names.append(room + row[1])
    return names


def test_the_table_of_files_is_complete() -> None:
    modules = [p for folder in ("ldm_ray", "serve", "tune") for p in (ROOT / folder).rglob("*.py")]
    expected = sorted(name_of(path) for path in modules if path.name != "__init__.py")
    assert sorted(table()) == expected


def test_the_readme_names_every_room() -> None:
    rooms = [f"ldm_ray/{path.name}/" for path in (ROOT / "ldm_ray").iterdir() if (path / "__init__.py").is_file()]
    assert [room for room in sorted(rooms) if f"`{room}`" not in (ROOT / "README.md").read_text()] == []


def test_formats_has_every_file_of_the_output_folder() -> None:
    run, search = RunPaths(Path("/out"), "NAME"), SearchPaths(Path("/out/tune/SEARCH"))
    files = [getattr(paths, name) for paths in (run, search) for name in properties(type(paths))]
    files += [run.checkpoint(1), run.sample(1), floors_file(run.outdir, "FINGERPRINT"), examples_dir(run.outdir, "")]
    text = (ROOT / "docs" / "formats.md").read_text()
    missing = [str(file) for file in files if not re.search(rf"[`/]{re.escape(file.name)}[`/]", text)]
    assert missing == []


def properties(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if isinstance(value, property)]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_a_file_that_is_named_is_there(path: Path) -> None:
    text = path.read_text(errors="ignore")
    if path == DESIGN:
        text = re.sub(r"(?m)^\| `\w+\.py` \|", "", text)  # the table, which says its folders in the headings
    bases = [path.parent, *(ROOT / base for base in BASES)]
    names = {name.removeprefix("/home/ray/ldm_ray/") for name in FILE.findall(text)}
    assert [name for name in sorted(names) if not any((base / name).is_file() for base in bases)] == []


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_a_module_that_is_named_is_there(path: Path) -> None:
    missing = []
    for dotted in sorted(set(MODULE.findall(path.read_text(errors="ignore")))):
        place, names = ROOT / "ldm_ray", dotted.strip(".").split(".")
        while names and (place / names[0]).is_dir():
            place /= names.pop(0)
        file = place / f"{names[0]}.py" if names else place / "__init__.py"
        attribute = names[1] if len(names) > 1 else ""
        if not file.is_file() or not re.search(rf"\b{attribute}\b", file.read_text()):
            missing.append(f"ldm_ray{dotted}")
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_link_leads_somewhere(path: Path) -> None:
    broken = []
    for target, anchor in LINK.findall(path.read_text()):
        if "://" in target:
            continue
        file = path.parent / target if target else path
        if not file.exists() or (anchor and anchor[1:] not in anchors(file)):
            broken.append(target + anchor)
    assert broken == []


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", file.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

"""The documentation: every example runs, every link leads somewhere, every table shows the newest results."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
from arcmerge.cli import main
from arcmerge.merging.methods.method import Method
from arcmerge.merging.methods.registry import METHODS
from arcmerge.merging.recipe.parameters import REQUIRED

HOUSE = Path(__file__).resolve().parent.parent
DOCS = HOUSE / "docs"
GENERATED = {DOCS / "proof.md", DOCS / "architectures.md"}
PAGES = [HOUSE / "README.md", HOUSE / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
WITH_EXAMPLES = [page for page in PAGES if "\n```" in page.read_text(encoding="utf-8") and page not in GENERATED]

# A fence with its language and, in the line before it, the comment that excludes it.
_FENCE = re.compile(r"^(?P<skip><!-- not run -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_MODELS = {"first": "gemma-a", "second": "gemma-b", "parent": "gemma-c"}
_TEXT = "An assignment statement evaluates the expression list and assigns the single resulting object.\n\n" * 3


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line in the page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are not excluded."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["text"], text.count("\n", 0, match.start("text")) + 1)
        for match in _FENCE.finditer(text)
        if not match["skip"]
    ]


def name(page: Path) -> str:
    return str(page.relative_to(HOUSE))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `pair` of the quickstart, with tiny models in place of the trained ones."""
    folder = tmp_path_factory.mktemp("docs") / "pair"
    folder.mkdir()
    for role, model in _MODELS.items():
        tiny.make(model, folder).rename(folder / role)
    (folder / "validation.txt").write_text(_TEXT)
    return folder


def run_shell(text: str, place: str) -> None:
    """Commands of arcmerge run in this process, which has loaded everything; other blocks run in a shell."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.strip()]
    if all(command[0] == "arcmerge" and not set("|<>$") & set("".join(command)) for command in commands):
        for command in commands:
            assert main(command[1:]) == 0, f"{place}: {shlex.join(command)}"
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{place}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name)
@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_a_page_run(
    page: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """In the order of the page, in one folder. A YAML block that begins with `# NAME.yml` becomes that file."""
    shutil.copytree(pair, tmp_path / "pair")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    variables: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        place = f"{name(page)}:{block.line}"
        if block.language == "yaml":
            if title := re.match(r"# (\S+\.yml)\n", block.text):
                Path(title[1]).write_text(block.text)
        elif block.language == "bash":
            run_shell(block.text, place)
        elif block.language == "python":
            exec(compile(block.text, place, "exec"), variables)


def test_the_pages_have_examples() -> None:
    languages = [block.language for page in WITH_EXAMPLES for block in blocks(page)]
    assert languages.count("bash") >= 15
    assert languages.count("python") >= 8


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for link in _LINK.findall(text):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(link)
    assert not wrong


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, by GitHub's rule."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_a_table_of_contents() -> None:
    trees = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("index.md"))
    trees += (DOCS / "kernels.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^[\w/]+$", trees, re.MULTILINE))
    pages = {page.stem for page in DOCS.rglob("*.md") if page.stem != "index"}
    assert not pages - listed


def rows(page: Path) -> dict[str, str]:
    """The second cell of each row of the tables of a page, by the name in the first."""
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_the_page_of_a_method_has_its_parameters_and_defaults(method: Method) -> None:
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    pages = dict(re.findall(r"\[`(\w+)`\]\((\w+\.md)\)", index))
    # What methods of differences have in common is on a page of theirs.
    defaults = {**rows(DOCS / "methods" / "differences.md"), **rows(DOCS / "methods" / pages[method.name])}
    for parameter in method.parameters:
        default = "required" if parameter.default is REQUIRED else str(parameter.default).lower()
        shown = re.findall(r"[\w.-]+", defaults[parameter.name])
        numbers = [float(word) for word in shown if re.match(r"[\d.]", word)]
        assert default in shown or parameter.default in numbers, f"{parameter.name}: {defaults[parameter.name]}"


def test_tables_show_the_newest_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HOUSE / "benchmarks"))
    import table

    for path, text in table.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python benchmarks/table.py"


def test_pictures_are_small() -> None:
    sizes = [path.stat().st_size for path in (DOCS / "img").iterdir()]
    assert max(sizes) < 100_000
    assert sum(sizes) < 1_500_000


def test_the_readme_fits_a_few_screens() -> None:
    assert len((HOUSE / "README.md").read_text().splitlines()) <= 120

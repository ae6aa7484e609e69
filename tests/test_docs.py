"""The documentation site: it builds, every pass has a page, and what the pages show is true."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from zeroskip.ir.errors import RecipeError
from zeroskip.ir.program import Program
from zeroskip.pass_docs import option_docs, pass_doc
from zeroskip.passes import PASSES, Pass
from zeroskip.passes.manager import check_requirements
from zeroskip.recipe import loads_recipe
from zeroskip.recipe_options import options_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
sys.path.insert(0, str(DOCS / "hooks"))
# mkdocs imports its hooks like this, too: they are no package.
command_page, pass_pages, source_pages = map(
    importlib.import_module, ("command_page", "pass_pages", "source_pages")
)

FENCE = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language; those that include a file are left out."""
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    codes = [each["code"] for each in found if each["language"] == language]
    return [code for code in codes if "--8<--" not in code]


def zeroskip_commands(text: str) -> Iterator[list[str]]:
    """The words of each `zeroskip ...` line of a shell text, without `zeroskip`."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("- ").removeprefix("run: "), comments=True)
        if words[:1] == ["zeroskip"]:
            yield words[1:]


def check_command(words: list[str]) -> None:
    """Parses a command line without running it; raises for what does not exist."""
    known = command_page.commands()
    length = max(n for n in (1, 2) if n == 1 or " ".join(words[:2]) in known)
    known[" ".join(words[:length])].make_context("zeroskip", list(words[length:]))


def test_every_pass_has_a_page() -> None:
    grouped = [name for group in pass_pages.groups() for name in group.passes]
    assert sorted(grouped) == sorted(PASSES)
    pages = pass_pages.pass_pages()
    assert {f"passes/{name}.md" for name in PASSES} | {"passes/index.md"} == set(pages)
    for name, cls in PASSES.items():
        text = pages[f"passes/{name}.md"]
        assert cls.__name__ in text
        assert all(f"| `{option}` |" in text for option in options_of(cls))


def test_every_option_is_described() -> None:
    silent = [
        (name, option)
        for name, cls in PASSES.items()
        for option in options_of(cls)
        if not option_docs(cls).get(option)
    ]
    assert silent == []


@pytest.mark.parametrize("name", PASSES)
def test_the_recipe_of_a_page_can_be_read_and_its_order_works(name: str) -> None:
    (text,) = [group.passes[name] for group in pass_pages.groups() if name in group.passes]
    steps = loads_recipe(text).passes
    assert name in [step.name for step in steps]
    check_requirements(steps, frozenset())


@dataclass(frozen=True)
class Sample(Pass):
    """Does a thing.

    More of it.

    Refuses the rest.

    Args:
        known: Begins here,
            and ends here: `a: b`.

    Before::

        %1 = relu(x)

    Source: Somebody, arXiv 2301.00774.
    """

    known: int = 0
    silent: int = 0

    name = "sample"

    def run(self, program: Program) -> Program:
        return program


def test_a_docstring_in_parts() -> None:
    doc = pass_doc(Sample)
    assert (doc.summary, doc.paragraphs) == ("Does a thing.", ("More of it.",))
    assert doc.refusals == ("Refuses the rest.",)
    assert doc.listings == (("Before", "%1 = relu(x)"),)
    assert doc.source == "Somebody, arXiv 2301.00774."
    assert option_docs(Sample) == {"known": "Begins here, and ends here: `a: b`."}


def test_the_recipes_of_the_pages_can_be_read() -> None:
    """A block with passes is a recipe; any other is YAML at least."""
    recipes = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            try:
                if re.search(r"^passes:", block, re.M):
                    assert loads_recipe(block, where=page.name).passes
                    recipes += 1
                else:
                    assert yaml.safe_load(block) is not None
            except (RecipeError, yaml.YAMLError) as error:
                pytest.fail(f"{page.name}: {error}\n{block}")
    assert recipes >= 5


def test_the_python_of_the_pages_compiles() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")


def test_files_that_pages_show_are_marked_as_the_site_reads_them() -> None:
    """A formatter may take the marker for Python; then the site shows the marker."""
    shown = 0
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.search(r"8\s*<\s*-", line):
                found = re.fullmatch(r'--8<-- "([^":]+)(:[\d:]*)?"', line)
                assert found, f"{page.name}: {line}"
                assert (ROOT / found[1]).is_file()
                shown += 1
    assert shown


def test_the_commands_of_the_pages_exist() -> None:
    shown = [
        (page.name, words)
        for page in PAGES
        for block in blocks(page, "bash")
        for words in zeroskip_commands(block)
    ]
    assert len(shown) > 20
    for page_name, words in shown:
        try:
            check_command(words)
        except Exception as error:  # typer's usage errors have no public base class
            pytest.fail(f"{page_name}: zeroskip {shlex.join(words)}: {error}")


@pytest.mark.parametrize(
    "line", ["zeroskip nothing", "zeroskip eval x --txt y", "zeroskip tune a b", "zeroskip export"]
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    (words,) = zeroskip_commands(line)
    with pytest.raises(Exception, match=r"nothing|--txt|unexpected|[Mm]issing"):
        check_command(words)


def test_every_command_is_in_the_reference() -> None:
    page = command_page.command_page()
    for name, command in command_page.commands().items():
        assert f"## zeroskip {name}\n" in page
        assert command.help, f"zeroskip {name} says nothing about itself"
        assert all(option in page for p in command.params for option in p.opts)


def test_links_out_of_the_pages_lead_to_pages_that_show_the_file() -> None:
    text = "[a](../examples/quickstart.py) [b](../README.md#passes) [c](other.md) [d](https://x.y)"
    made = source_pages.linked_sources({"page.md": text})
    assert set(made) == {"readme.md", "source/examples/quickstart.py.md"}
    assert "def tiny_llama" in made["source/examples/quickstart.py.md"]
    assert source_pages.with_site_links("deep/page.md", text.replace("../", "../../")) == (
        "[a](../source/examples/quickstart.py.md) [b](../readme.md#passes) [c](other.md) "
        "[d](https://x.y)"
    )


def test_the_readme_as_a_page_has_no_links_that_lead_nowhere() -> None:
    page = source_pages.readme_page()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page):
        assert (DOCS / link).is_file()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once; a link or an anchor that leads nowhere fails here."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    target = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target), strict=True))
    return target


def test_the_site_has_every_page(site: Path) -> None:
    shown = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= shown
    assert {f"passes/{name}.html" for name in PASSES} <= shown
    assert {"commands.html", "readme.html"} <= shown
    assert not (site / "hooks").exists()


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    assert [page.stem for page in DOCS.glob("*.md") if f'href="{page.stem}.html"' not in home] == []


def test_the_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload)"[^>]*href="([^"]+)"', text)
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []


def test_settings_of_the_site_are_strict() -> None:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["strict"] is True
    assert settings["theme"]["font"] is False

"""The pages keep step with the code: what they show runs, and what exists is in them.

The Python in README.md runs, its blocks in order, as one program, in an empty folder. A block that
follows the HTML comment `<!-- not run: why -->` is only compiled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from zeroskip.passes import PASSES
from zeroskip.recipe import loads_recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(
    r"(?P<skipped><!-- not run: [^\n]+ -->\n+)?^```python\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A block of Python, the line it begins at, and whether it runs."""

    line: int
    code: str
    runs: bool


def blocks_of(text: str) -> list[Block]:
    """Every ```python block of a page."""
    return [
        Block(
            text.count("\n", 0, found.start("code")) + 1,
            found["code"],
            found["skipped"] is None,
        )
        for found in BLOCK.finditer(text)
    ]


def test_the_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "readme"}
    text = README.read_text(encoding="utf-8")
    # An export takes seconds for each layer of the model, which is no real one anyway.
    layers = '"num_hidden_layers": 2'
    assert layers in text
    for block in blocks_of(text.replace(layers, '"num_hidden_layers": 1')):
        # Blank lines in front make a traceback show the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(README), "exec")
        if block.runs:
            exec(code, names)


def test_blocks_are_found_with_their_lines() -> None:
    page = "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n```python\ny\n```\n```bash\nls\n```\n"
    assert blocks_of(page) == [Block(3, "x = 1\n", True), Block(7, "y\n", False)]


def test_every_pass_is_in_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.partition("## Passes")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    ]

    def facts(kinds: tuple[type, ...]) -> str:
        return ", ".join(f"`{kind.__name__}`" for kind in kinds)

    assert [[name, cls, needs, gives] for name, cls, _, needs, gives in rows] == [
        [f"`{name}`", f"`{cls.__name__}`", facts(cls.requires), facts(cls.provides)]
        for name, cls in PASSES.items()
    ]


def test_the_recipes_of_the_readme_can_be_read() -> None:
    recipes = re.findall(r"^```yaml\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    assert recipes
    for recipe in recipes:
        assert loads_recipe(recipe).passes


def test_the_links_of_the_pages_lead_somewhere() -> None:
    """Pages that are made with the site are there only then: tests/test_docs.py builds it."""
    made = {"commands.md", "readme.md", "passes/index.md", *(f"passes/{n}.md" for n in PASSES)}
    for page in (README, *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            if page == README or link not in made:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_guide_shows_the_code_of_the_example() -> None:
    guide = (ROOT / "docs" / "writing-a-pass.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "custom_pass.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in example.splitlines()}
    for block in blocks_of(guide):
        if "small_program" not in block.code:
            assert [x for x in block.code.splitlines() if x.strip() not in lines] == []


def test_every_module_is_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [
        path.relative_to(ROOT).as_posix()
        for folder in ("ir", "passes", "runtime", "zeroskip")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert [module for module in modules if f"`{module}`" not in page] == []

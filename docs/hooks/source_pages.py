"""Pages of files outside docs/ that pages link to, so that the site needs no server for sources."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?P<path>\.\./[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {
    ".py": "python",
    ".cpp": "cpp",
    ".h": "cpp",
    ".cs": "csharp",
    ".java": "java",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".sh": "bash",
    ".md": "markdown",
    ".json": "json",
    ".toml": "toml",
}
README_PAGE = "readme.md"


def linked_sources(pages: dict[str, str]) -> dict[str, str]:
    """The generated pages that the links of `pages` (path under docs/: Markdown) lead to."""
    made = {README_PAGE: readme_page()}
    for path, text in pages.items():
        for found in LINK.finditer(text):
            target = _outside(path, found["path"])
            if target is not None and target != "README.md":
                made[_page_of(target)] = _source_page(target)
    return made


def with_site_links(path: str, text: str) -> str:
    """The Markdown of a page with its links out of docs/ led to generated pages."""

    def link(found: re.Match[str]) -> str:
        target = _outside(path, found["path"])
        if target is None:
            return found[0]
        page = README_PAGE if target == "README.md" else _page_of(target)
        up = "../" * (len(PurePosixPath(path).parts) - 1)
        anchor = found["anchor"] or "" if page == README_PAGE else ""
        return f"]({up}{page}{anchor})"

    return LINK.sub(link, text)


def readme_page() -> str:
    """README.md as a page of the site: its links to docs/ are links to pages here."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    # What is left leads to files of the repository, which are only shown where a page needs them.
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([\w./-]+)\)", _kept_if_page, text)


def _kept_if_page(found: re.Match[str]) -> str:
    return (
        found[0] if found[2].endswith(".md") and (ROOT / "docs" / found[2]).exists() else found[1]
    )


def _outside(page: str, link: str) -> str | None:
    """The path in the repository that a link leads to, if that is not in docs/."""
    folder = (ROOT / "docs" / page).parent
    target = (folder / link).resolve()
    if not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs"):
        return None
    return target.relative_to(ROOT).as_posix()


def _page_of(target: str) -> str:
    return f"source/{target}.md"


def _source_page(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        shown = [name for name in names if "__pycache__" not in name]
        return f"# {target}\n\nIn the repository:\n\n" + "".join(f"- `{n}`\n" for n in shown)
    language = LANGUAGES.get(path.suffix, "text")
    code = path.read_text(encoding="utf-8")
    return f"# {target}\n\n````{language}\n{code}````\n"

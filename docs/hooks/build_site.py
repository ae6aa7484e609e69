"""What mkdocs calls: pages that are made while the site is built, and never committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_page import command_page  # mkdocs puts this folder on the path
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pass_pages import pass_navigation, pass_pages
from source_pages import linked_sources, with_site_links


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in the navigation of the passes."""
    config.nav = [_filled(entry) for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    written = {
        file.src_uri: Path(str(file.abs_src_path)).read_text(encoding="utf-8")
        for file in files.documentation_pages()
    }
    made = {**pass_pages(), "commands.md": command_page()}
    made |= linked_sources(written | made)
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links to files of the repository to pages that show them."""
    return with_site_links(page.file.src_uri, markdown)


def _filled(entry: Any) -> Any:
    if isinstance(entry, dict) and entry.get("Passes") == "passes/":
        return {"Passes": pass_navigation()}
    return entry

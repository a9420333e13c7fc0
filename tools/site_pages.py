"""MkDocs hook: what the pages of `docs/` link to elsewhere in the repository becomes part of the site, under its path.

So the catalogue leads to the plugins' READMEs and these to their plots, and `mkdocs build --strict` checks the links.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ERRORS = "cli/peftx_cli/errors/*.md"
SHOWN = ("CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/*", "plugins/*/*/README.md", ERRORS)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """In the navigation the plugins, by hook, and the errors, by code."""
    hooks: dict[str, list[Any]] = {}
    for path in sorted(ROOT.glob("plugins/*/*/README.md")):
        uri = path.relative_to(ROOT).as_posix()
        hooks.setdefault(path.parts[-3], []).append({path.parts[-2]: uri})
    config.nav = [
        *(config.nav or []),
        {"Plugins": [{hook: pages} for hook, pages in hooks.items()]},
        {"Errors": [{path.stem: path.relative_to(ROOT).as_posix()} for path in sorted(ROOT.glob(ERRORS))]},
        {"Writing a plugin": "CONTRIBUTING.md"},
        {"Benchmarks": "benchmarks/README.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In the site `docs/` is the root: links out of it lose a step, links into it lose its name."""
    markdown = without_reasons(markdown)
    if page.file.generated_by is None:
        up = "../" * (page.file.src_uri.count("/") + 1)
        return markdown.replace(f"]({up}", f"]({up[3:]}")
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)


def without_reasons(markdown: str) -> str:
    """Fences without `norun="..."`, why a block does not run in the tests: superfences knows no such option."""
    return re.sub(r'^(```\w+) norun="[^"\n]*"$', r"\1", markdown, flags=re.MULTILINE)

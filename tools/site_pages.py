"""MkDocs hook: the site from `docs/`, from what else of the repository is shown, and from the code (`tools/pages`).

What the pages of `docs/` link to elsewhere in the repository becomes part of the site, under its path: the catalogue
leads to the plugins' READMEs and these to their plots. A link that leads nowhere ends the build, with file and line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.exceptions import PluginError
from pages import UnknownPart, filled
from pages.gallery import listed
from pages.links import dead
from pages.shown import as_in_site, from_elsewhere, shown, with_ways_back
from pages.together import goes_with, script

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
MATRIX = "choose/matrix.js"
GLOSSARY = "glossary.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Dead links, before anything is built; then folders of the navigation as their pages, and the plugins by hook."""
    pages = [*sorted((ROOT / "docs").rglob("*.md")), *shown(".md")]
    try:
        found = dead(pages, ROOT, _filled)
    except UnknownPart as error:
        raise PluginError(str(error)) from error
    if found:
        raise PluginError("links that lead nowhere:\n" + "\n".join(found))
    config.nav = _expanded(config.nav or [])
    return config


def _expanded(nav: list[Any]) -> list[Any]:
    """`- Plugins: plugins/` is a section of what is shown of that folder; without pages there is none."""
    found = []
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        if isinstance(value, list):
            found.append({title: _expanded(value)})
        elif value.endswith("/"):
            if pages := _folder(value):
                found.append({title: pages})
        else:
            found.append(entry)
    return found


def _folder(place: str) -> list[Any]:
    """Pages by their own title; READMEs by the folders that they lie in, `plugins/HOOK/NAME/README.md`."""
    uris = [path.relative_to(ROOT).as_posix() for path in shown(".md")]
    groups: dict[str, list[Any]] = {}
    for uri in (uri for uri in uris if uri.startswith(place)):
        *folders, _ = uri.removeprefix(place).removesuffix(".md").split("/")
        groups.setdefault("/".join(folders[:-1]), []).append({folders[-1]: uri} if folders else uri)
    return groups.pop("", []) + [{group: pages} for group, pages in groups.items()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for path in shown():
        uri = path.relative_to(ROOT).as_posix()
        if path.suffix == ".html":
            page = with_ways_back(path.read_text("utf-8"), uri)
            files.append(File.generated(config, uri, content=page))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, MATRIX, content=script()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What is made in its place, and links as they are in the site."""
    uri = page.file.src_uri
    markdown = filled(markdown, uri)  # on_config has seen that each part is made
    markdown = as_in_site(markdown, uri, is_shown=page.file.generated_by is not None)
    own = {each.link.removeprefix("../../"): each.name for each in listed()}
    if uri in own and uri.startswith("plugins/"):
        markdown = f"{markdown}\n{goes_with(own[uri], '../' * uri.count('/'))}"
    up = "../" * uri.count("/")
    return (
        markdown if uri == GLOSSARY else f"{markdown}\n\n[What the words mean]({up}{GLOSSARY}){{ .words }}\n"
    )


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raises where a page would ask another host for something as it opens."""
    if asked := from_elsewhere(output):
        raise PluginError(f"{page.file.src_uri}: the page asks other hosts for {', '.join(asked)}")
    return output


def _filled(page: Path) -> str:
    return filled(page.read_text("utf-8"), page.relative_to(ROOT).as_posix())

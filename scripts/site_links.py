"""What mkdocs is told of links that lead out of `docs/`: the file that is linked to comes along, under `repository/` in the site.

The pages are written for readers on GitHub and on the disk, too, where such links lead to the files themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def outside(page: str, link: str) -> str | None:
    """The path in the repository of a file outside of `docs/` that a page links to.

    Args:
        page: Path of the page in `docs/`.
        link: As it stands in the page, without an anchor.
    """
    if re.match(r"[a-z]+:", link):
        return None
    path = normpath(f"docs/{page}/../{link}")
    return None if path.startswith("docs/") or not (ROOT / path).exists() else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    found = {
        path
        for page in files.documentation_pages()
        for link in LINK.findall(page.content_string)
        if (path := outside(page.src_uri, link))
    }
    for path in sorted(found):
        file = ROOT / path
        if file.is_dir():
            listing = "\n".join(f"- {one.name}" for one in sorted(file.iterdir()))
            files.append(File.generated(config, f"repository/{path}/index.md", content=f"# {path}\n\n{listing}\n"))
        else:
            files.append(File.generated(config, f"repository/{path}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    del config, files
    here = page.file.src_uri

    def written(match: re.Match[str]) -> str:
        path = outside(here.removeprefix("repository/"), match[1])
        if path is None:
            return match[1]
        target = f"repository/{path}" + ("/index.md" if (ROOT / path).is_dir() else "")
        return relpath(target, f"{here}/..")

    if here.startswith("repository/"):
        # Of a page from outside, links are told, and lead nowhere: what it links to is not part of the site.
        return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", markdown)
    return LINK.sub(written, markdown)

"""EPUB files as publishers make them."""

from __future__ import annotations

import html
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTAINER = """<?xml version="1.0"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""

_PACKAGE = """<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:title>{title}</dc:title><dc:creator>A. Writer</dc:creator><dc:language>en</dc:language></metadata>
<manifest>{items}</manifest><spine{toc}>{spine}</spine></package>"""

NAV = """<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><body>
<nav epub:type="toc"><ol>{links}</ol></nav></body></html>"""

NCX = """<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap>{points}</navMap></ncx>"""


def page(body: str) -> str:
    """A chapter's document."""
    return f"""<?xml version="1.0" encoding="utf-8"?>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><head><title>no</title></head>
<body>{body}</body></html>"""


def write_epub(path: Path, title: str, chapters: Sequence[tuple[str, str]]) -> Path:
    """A book of a document for each chapter, with a table of contents."""
    documents = {
        f"text/c{number}.xhtml": page(f"<h1>{html.escape(name)}</h1><p>{html.escape(text)}</p>")
        for number, (name, text) in enumerate(chapters)
    }
    links = "".join(
        f'<li><a href="text/c{number}.xhtml">{html.escape(name)}</a></li>' for number, (name, _) in enumerate(chapters)
    )
    return write_pages(path, documents, title=title, nav=NAV.format(links=links))


def write_pages(
    path: Path,
    documents: Mapping[str, str | bytes],
    *,
    title: str = "A Book",
    nav: str | None = None,
    ncx: str | None = None,
    more: Mapping[str, str] | None = None,
) -> Path:
    """A book of documents by name."""
    xhtml = "application/xhtml+xml"
    items = [f'<item id="d{n}" href="{name}" media-type="{xhtml}"/>' for n, name in enumerate(documents)]
    if nav is not None:
        items.append(f'<item id="nav" href="nav.xhtml" media-type="{xhtml}" properties="nav"/>')
    if ncx is not None:
        items.append('<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>')
    spine = "".join(f'<itemref idref="d{n}"/>' for n in range(len(documents)))
    toc = ' toc="ncx"' if ncx is not None else ""
    package = _PACKAGE.format(title=html.escape(title), items="".join(items), spine=spine, toc=toc)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        archive.writestr("META-INF/container.xml", _CONTAINER)
        archive.writestr("OEBPS/book.opf", package)
        for name, text in {**documents, "nav.xhtml": nav, "toc.ncx": ncx}.items():
            if text is not None:
                archive.writestr(f"OEBPS/{name}", text)
        for name, text in (more or {}).items():
            archive.writestr(name, text)
    return path

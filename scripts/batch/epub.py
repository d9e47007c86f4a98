"""The chapters of an EPUB as text: its spine in reading order, cut and named as its table of contents says.

Formats: EPUB 3.3 (W3C), EPUB 2.0.1 (OPF, NCX). A book is data from anywhere: sizes are bounded, no entity or address
in it is followed, and what cannot be read is an error that says so.
"""

from __future__ import annotations

import html.entities
import posixpath
import re
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lxml import etree  # type: ignore[import-untyped, unused-ignore]

MAX_FILES = 20_000
MAX_FILE_BYTES = 32_000_000
MAX_TOTAL_BYTES = 256_000_000

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_FONT_OBFUSCATION = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
_DOCUMENTS = ("application/xhtml+xml", "text/html")
_TOC_LEVELS = 2
"""Parts and chapters; what lies deeper is no chapter of its own."""

_ENTITY = re.compile(rb"&([A-Za-z][A-Za-z0-9]{1,31});")
_XML_ENTITIES = (b"amp", b"lt", b"gt", b"quot", b"apos")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = frozenset(
    ("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt")
    + ("figcaption", "figure", "footer", "form", "header", "hr", "li", "main", "ol", "p", "pre", "section", "summary")
    + ("table", "td", "th", "tr", "ul", *_HEADINGS)
)
_UNSAID = frozenset(
    ("head", "script", "style", "template", "noscript", "svg", "math", "object", "iframe", "audio", "video")
    + ("rt", "rp", "nav")
)
_UNSAID_TYPES = frozenset(
    ("noteref", "pagebreak", "toc", "landmarks", "page-list", "footnote", "footnotes", "endnote", "endnotes")
)


class EpubError(Exception):
    """A file that is no readable EPUB; the message says why."""


@dataclass(frozen=True)
class Chapter:
    """A stretch of a text with a name of its own, or None.

    Args:
        title: as the table of contents or its heading says.
        text: paragraphs with an empty line between them; the title is not in it, unless the text repeats it.
    """

    title: str | None
    text: str


@dataclass(frozen=True)
class Book:
    """What an EPUB says."""

    title: str | None
    author: str | None
    language: str | None
    chapters: tuple[Chapter, ...]


def read_epub(path: Path) -> Book:
    """Read a book.

    Raises:
        EpubError: for what is no EPUB, is encrypted, too large, or has no text.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive).book()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise EpubError(f"not a readable EPUB: {error}") from error


@dataclass(frozen=True)
class _Item:
    """An entry of the package's manifest."""

    path: str
    media_type: str
    properties: frozenset[str]


@dataclass
class _Draft:
    """A chapter that is being read."""

    title: str | None
    heading: str | None = None
    blocks: list[str] = field(default_factory=list)

    def finished(self) -> Chapter:
        return Chapter(self.title or self.heading, "\n\n".join(self.blocks))


class _Reader:
    """Reads one book.

    Args:
        archive: an open EPUB.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._names = {info.filename: info for info in archive.infolist()}
        self._num_bytes = 0
        if len(self._names) > MAX_FILES:
            raise EpubError(f"holds more than {MAX_FILES:,} files")

    def book(self) -> Book:
        self._refuse_encrypted()
        package_path = self._package_path()
        package = self._xml(package_path)
        items = self._items(package, posixpath.dirname(package_path))
        marks = self._marks(package, items)
        drafts = self._drafts([*self._spine(package, items)], marks)
        chapters = tuple(chapter for chapter in (draft.finished() for draft in drafts) if chapter.text.strip())
        if not chapters:
            raise EpubError("holds no text")
        return Book(_meta(package, "title"), _meta(package, "creator"), _meta(package, "language"), chapters)

    # ------------------------------------------------------------------------------ package

    def _refuse_encrypted(self) -> None:
        if _ENCRYPTION not in self._names:
            return
        methods = self._xml(_ENCRYPTION).xpath("//*[local-name()='EncryptionMethod']/@Algorithm")
        if any(method not in _FONT_OBFUSCATION for method in methods):
            raise EpubError("is encrypted (DRM)")

    def _package_path(self) -> str:
        paths = self._xml(_CONTAINER).xpath("//*[local-name()='rootfile']/@full-path")
        if not paths:
            raise EpubError(f"{_CONTAINER} names no package")
        return str(paths[0])

    @staticmethod
    def _items(package: etree._Element, folder: str) -> dict[str, _Item]:
        items = {}
        for each in package.xpath("//*[local-name()='manifest']/*[local-name()='item'][@id and @href]"):
            path = _resolved(folder, each.get("href"))[0]
            properties = frozenset((each.get("properties") or "").split())
            items[each.get("id")] = _Item(path, each.get("media-type") or "", properties)
        return items

    @staticmethod
    def _spine(package: etree._Element, items: Mapping[str, _Item]) -> Iterator[str]:
        """Paths of the documents that are read, in order."""
        for each in package.xpath("//*[local-name()='spine']/*[local-name()='itemref'][@idref]"):
            item = items.get(each.get("idref"))
            if item is None or each.get("linear") == "no" or item.media_type not in _DOCUMENTS:
                continue
            if "nav" not in item.properties:
                yield item.path

    def _marks(self, package: etree._Element, items: Mapping[str, _Item]) -> dict[str, dict[str, str]]:
        """Where chapters begin: document → id in it ("" for its beginning) → title."""
        spine = package.xpath("//*[local-name()='spine']/@toc")
        for item in items.values():
            if "nav" in item.properties and item.path in self._names:
                return _nav_marks(self._document(item.path), item.path)
        named = [items[each] for each in spine if each in items]
        ncx = [*named, *(item for item in items.values() if item.media_type == "application/x-dtbncx+xml")]
        for item in ncx:
            if item.path in self._names:
                return _ncx_marks(self._xml(item.path), item.path)
        return {}

    # ------------------------------------------------------------------------------ text

    def _drafts(self, documents: list[str], marks: Mapping[str, Mapping[str, str]]) -> list[_Draft]:
        drafts: list[_Draft] = []
        is_named = any(document in marks for document in documents)
        for document in documents:
            here = marks.get(document, {})
            if "" in here or not drafts or not (is_named and drafts[-1].title):
                drafts.append(_Draft(here.get("")))  # otherwise it continues the chapter before
            body = self._document(document).find(".//{*}body")
            if body is not None:
                _Speech(here, drafts).read(body)
        return drafts

    def _document(self, path: str) -> etree._Element:
        """A document, valid or not."""
        data = self._data(path)
        try:
            return _parsed(_ENTITY.sub(_entity, data))
        except etree.XMLSyntaxError:
            encoding = None if re.search(rb"charset|encoding", data[:1024]) else "utf-8"
            tree = etree.fromstring(data, etree.HTMLParser(no_network=True, encoding=encoding))
            if tree is None:
                raise EpubError(f"{path} cannot be read") from None
            return tree

    def _xml(self, path: str) -> etree._Element:
        try:
            return _parsed(_ENTITY.sub(_entity, self._data(path)))
        except etree.XMLSyntaxError as error:
            raise EpubError(f"{path} cannot be read: {error}") from error

    def _data(self, path: str) -> bytes:
        info = self._names.get(path)
        if info is None:
            raise EpubError(f"{path} is missing")
        with self._archive.open(info) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        self._num_bytes += len(data)
        if len(data) > MAX_FILE_BYTES or self._num_bytes > MAX_TOTAL_BYTES:
            raise EpubError(f"{path} is too large for a chapter")
        return data


def _parsed(data: bytes) -> etree._Element:
    """Strictly, and nothing beyond the data is looked at."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True)
    return etree.fromstring(data, parser)


def _entity(match: re.Match[bytes]) -> bytes:
    """A name that HTML knows and XML does not, as a number."""
    name = match[1]
    code = html.entities.name2codepoint.get(name.decode("ascii"))
    return match[0] if name in _XML_ENTITIES or code is None else b"&#%d;" % code


def _meta(package: etree._Element, name: str) -> str | None:
    found = package.xpath(f"//*[local-name()='metadata']//*[local-name()='{name}']")
    text = " ".join("".join(found[0].itertext()).split()) if found else ""
    return text or None


def _resolved(folder: str, href: str) -> tuple[str, str]:
    """A file of the archive, and an id in it."""
    path, _, fragment = href.partition("#")
    return posixpath.normpath(posixpath.join(folder, urllib.parse.unquote(path))), urllib.parse.unquote(fragment)


def _nav_marks(nav: etree._Element, path: str) -> dict[str, dict[str, str]]:
    type_name = "{http://www.idpf.org/2007/ops}type"
    navs = [each for each in nav.iter("{*}nav", "nav") if "toc" in (each.get(type_name) or "toc").split()]
    entries = []
    for link in navs[0].iter("{*}a", "a") if navs else ():
        level = sum(1 for above in link.iterancestors("{*}ol", "ol"))
        if level <= _TOC_LEVELS and link.get("href"):
            entries.append((link.get("href"), "".join(link.itertext())))
    return _marks_of(entries, path)


def _ncx_marks(ncx: etree._Element, path: str) -> dict[str, dict[str, str]]:
    entries = []
    for point in ncx.iter("{*}navPoint"):
        level = 1 + sum(1 for above in point.iterancestors("{*}navPoint"))
        content, label = point.find("{*}content"), point.find("{*}navLabel")
        if level <= _TOC_LEVELS and content is not None and content.get("src"):
            entries.append((content.get("src"), "" if label is None else "".join(label.itertext())))
    return _marks_of(entries, path)


def _marks_of(entries: list[tuple[str, str]], path: str) -> dict[str, dict[str, str]]:
    marks: dict[str, dict[str, str]] = {}
    for href, label in entries:
        document, fragment = _resolved(posixpath.dirname(path), href)
        marks.setdefault(document, {}).setdefault(fragment, " ".join(label.split()))
    return marks


class _Speech:
    """What is to be said of a document, put into chapters as it is read.

    Args:
        marks: ids at which a chapter begins, with its title.
        drafts: chapters until now; the last is gone on with.
    """

    def __init__(self, marks: Mapping[str, str], drafts: list[_Draft]) -> None:
        self._marks, self._drafts = marks, drafts
        self._words: list[str] = []

    def read(self, body: etree._Element) -> None:
        self._read(body)
        self._end_block()

    def _read(self, top: etree._Element) -> None:
        """All below an element. Without recursion: a book may be nested as deeply as it likes."""
        walk = etree.iterwalk(top, events=("start", "end"))
        for event, element in walk:
            tag = etree.QName(element).localname.lower() if isinstance(element.tag, str) else ""
            is_unsaid = not tag or _is_unsaid(element, tag)
            if event == "start" and is_unsaid:
                walk.skip_subtree()
            elif event == "start":
                self._begin(element, tag)
            else:
                if tag in _BLOCKS:
                    self._end_block(is_heading=tag in _HEADINGS)
                self._words.append((element is not top and element.tail) or "")

    def _begin(self, element: etree._Element, tag: str) -> None:
        if tag in _BLOCKS or element.get("id") in self._marks:
            self._end_block()
        if element.get("id") in self._marks:
            self._drafts.append(_Draft(self._marks[element.get("id")]))
        self._words.append(" " if tag == "br" else element.text or "")

    def _end_block(self, *, is_heading: bool = False) -> None:
        text = " ".join("".join(self._words).split())
        self._words.clear()
        if not text:
            return
        draft = self._drafts[-1]
        if is_heading and not draft.blocks and draft.heading is None:
            draft.heading = text
            if draft.title is None or _alike(text, draft.title):
                return
        draft.blocks.append(text)


def _alike(one: str, other: str) -> bool:
    return one.casefold().split() == other.casefold().split()


def _is_unsaid(element: etree._Element, tag: str) -> bool:
    types = (element.get("{http://www.idpf.org/2007/ops}type") or "").split()
    role = (element.get("role") or "").removeprefix("doc-")
    return tag in _UNSAID or element.get("hidden") is not None or not _UNSAID_TYPES.isdisjoint([*types, role])

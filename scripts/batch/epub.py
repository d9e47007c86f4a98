"""The chapters of an EPUB as text: its spine in reading order, cut and named as its table of contents says.

Formats: EPUB 3.3 (W3C), EPUB 2.0.1 (OPF, NCX). A book is data from anywhere: sizes are bounded, no entity or address
in it is followed, and what cannot be read is an error that says so. On lxml: the kept library for EPUB, EbookLib, is
under the AGPL, and gives documents, not what is to be said of them.
"""

from __future__ import annotations

import codecs
import html.entities
import posixpath
import re
import struct
import urllib.parse
import zipfile
import zlib
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
_DOCUMENTS = ("application/xhtml+xml", "text/html", "text/x-oeb1-document")
_DOCUMENT_SUFFIXES = (".xhtml", ".html", ".htm")
_SILENT = ("image/", "audio/", "video/", "font/", "text/css")
_TOC_LEVELS = 2
"""Parts and chapters; what lies deeper is no chapter of its own."""

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those of the standard (EPUB 3.3, OCF ZIP container)."""
_DAMAGED = (OSError, EOFError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)
"""What zipfile raises for bytes that are no ZIP."""
_SHOWN_CHARS = 200

_BEGINNINGS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)
_DECLARED = re.compile(
    rb"""\A\s*<\?xml\s[^>]*?\bencoding\s*=\s*["']([\w.:-]+)|<meta\s[^>]*?\bcharset\s*=\s*["']?\s*([\w.:-]+)""", re.I
)
_CODEC = re.compile(r"utf-8|iso8859-\d+|cp125\d|koi8-[ru]|shift_jis|euc_jp|iso2022_jp|euc_kr|big5|gb(k|2312|18030)")
"""Python has others, which are no encodings of text, or slow."""

_ENTITY = re.compile(r"&([A-Za-z][A-Za-z0-9]{1,31});")
_XML_ENTITIES = ("amp", "lt", "gt", "quot", "apos")
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
        EpubError: for what is no EPUB, is damaged, encrypted or too large, lacks a document, or has no text.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise EpubError(f"not a readable EPUB: {_shown(str(error))}") from error
    with archive:
        return _Reader(archive).book()


@dataclass(frozen=True)
class _Item:
    """An entry of the package's manifest."""

    path: str
    media_type: str
    properties: frozenset[str]

    @property
    def is_document(self) -> bool:
        """Whether there is something to say in it.

        Raises:
            EpubError: for what cannot be known.
        """
        if self.media_type in _DOCUMENTS or self.path.lower().endswith(_DOCUMENT_SUFFIXES):
            return True
        if self.media_type.startswith(_SILENT):
            return False
        raise EpubError(f"{_shown(self.path)} is no document that could be spoken ({_shown(self.media_type)})")


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
        items = self._items(package, package_path)
        marks = self._marks(package, items)
        documents = [*dict.fromkeys(self._spine(package, items))]  # none twice (EPUB 3.3, itemref)
        drafts = self._drafts(documents, marks)
        chapters = tuple(draft.finished() for draft in drafts if draft.blocks or draft.heading is not None)
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
        return _normal(str(paths[0]))

    @staticmethod
    def _items(package: etree._Element, package_path: str) -> dict[str, _Item]:
        items = {}
        for each in package.xpath("//*[local-name()='manifest']/*[local-name()='item'][@id and @href]"):
            path = _resolved(package_path, each.get("href"))[0]
            media_type = (each.get("media-type") or "").partition(";")[0].strip().lower()
            items[each.get("id")] = _Item(path, media_type, frozenset((each.get("properties") or "").split()))
        return items

    @staticmethod
    def _spine(package: etree._Element, items: Mapping[str, _Item]) -> Iterator[str]:
        """Paths of the documents that are read, in order.

        Raises:
            EpubError: for one that is not listed: a book is not read without some chapter of it.
        """
        for each in package.xpath("//*[local-name()='spine']/*[local-name()='itemref'][@idref]"):
            if each.get("linear") == "no":
                continue
            item = items.get(each.get("idref"))
            if item is None:
                raise EpubError(f"a document is missing: the manifest has no {_shown(each.get('idref'))!r}")
            if "nav" not in item.properties and item.is_document:
                yield item.path

    def _marks(self, package: etree._Element, items: Mapping[str, _Item]) -> dict[str, dict[str, str]]:
        """Where chapters begin: document → id in it ("" for its beginning) → title."""
        spine = package.xpath("//*[local-name()='spine']/@toc")
        for item in items.values():
            if "nav" in item.properties and item.path in self._names:
                nav = self._document(item.path)
                return {} if nav is None else _nav_marks(nav, item.path)
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
            root = self._document(document)
            if root is not None:
                _Speech(here, drafts).read(root)
        return drafts

    def _document(self, path: str) -> etree._Element | None:
        """A document, valid or not; None for an empty one."""
        text = self._text(path)
        try:
            return _parsed(text)
        except etree.LxmlError:
            try:
                return _parsed_leniently(text)
            except etree.LxmlError as error:
                raise _unreadable(path, error) from error

    def _xml(self, path: str) -> etree._Element:
        try:
            return _parsed(self._text(path))
        except etree.LxmlError as error:
            raise _unreadable(path, error) from error

    def _text(self, path: str) -> str:
        return _decoded(self._data(path))

    def _data(self, path: str) -> bytes:
        info = self._names.get(path)
        if info is None:
            raise EpubError(f"{_shown(path)} is missing")
        if info.compress_type not in _COMPRESSIONS:
            raise EpubError(f"{_shown(path)} is compressed as nothing in an EPUB may be")
        try:
            with self._archive.open(info) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except _DAMAGED as error:
            raise EpubError(f"{_shown(path)} is damaged: {_shown(str(error))}") from error
        self._num_bytes += len(data)
        if len(data) > MAX_FILE_BYTES or self._num_bytes > MAX_TOTAL_BYTES:
            raise EpubError(f"{_shown(path)} is too large for a chapter")
        return data


def _shown(text: str) -> str:
    """What a book says, for a message: nothing in it is taken for a command by a terminal, and it is not long."""
    text = "".join(char if char.isprintable() else "�" for char in text[: _SHOWN_CHARS + 1])
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _unreadable(path: str, error: etree.LxmlError) -> EpubError:
    return EpubError(f"{_shown(path)} cannot be read: {_shown(getattr(error, 'msg', None) or str(error))}")


def _decoded(data: bytes) -> str:
    """A document's text: as it begins, else as it declares, else UTF-8, else what old editors wrote."""
    encoding = next((encoding for begin, encoding in _BEGINNINGS if data.startswith(begin)), None) or _declared(data)
    if encoding is not None:
        return data.decode(encoding, "replace").removeprefix("\ufeff")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _declared(data: bytes) -> str | None:
    """The encoding that a document names, if it is one."""
    found = _DECLARED.search(data[:1024])
    if found is None:
        return None
    try:
        name = codecs.lookup((found[1] or found[2]).decode("ascii", "replace")).name
    except LookupError:
        return None
    if name in ("ascii", "iso8859-1"):
        return "cp1252"  # as browsers do: what else it has are quotation marks and dashes (WHATWG, Encoding)
    return name if _CODEC.fullmatch(name) else None


def _parsed(text: str) -> etree._Element:
    """Strictly, and nothing beyond the text is looked at.

    Raises:
        etree.LxmlError: it is no XML.
    """
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        remove_comments=True,
        remove_pis=True,
    )
    return etree.fromstring(_ENTITY.sub(_entity, text).encode(), parser)


def _parsed_leniently(text: str) -> etree._Element | None:
    """As HTML; None where there is nothing in it.

    Raises:
        etree.LxmlError: it was not read to its end.
    """
    if not text.strip():
        return None
    parser = etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True, huge_tree=True)
    root = etree.fromstring(text.encode(), parser)
    for entry in parser.error_log.filter_from_fatals():
        raise etree.LxmlError(entry.message)
    return root


def _entity(match: re.Match[str]) -> str:
    """A name that HTML knows and XML does not, as a number."""
    code = html.entities.name2codepoint.get(match[1])
    return match[0] if match[1] in _XML_ENTITIES or code is None else f"&#{code};"


def _meta(package: etree._Element, name: str) -> str | None:
    found = package.xpath(f"//*[local-name()='metadata']//*[local-name()='{name}']")
    text = " ".join("".join(found[0].itertext()).split()) if found else ""
    return text or None


def _normal(path: str) -> str:
    """A path as the archive's directory has it; none leads out of the archive."""
    return posixpath.normpath(posixpath.join("/", path)).lstrip("/")


def _resolved(base: str, href: str) -> tuple[str, str]:
    """A file of the archive, and an id in it ("" for none).

    Args:
        base: the file that refers to it.
        href: a relative URL.
    """
    path, _, fragment = href.strip().partition("#")
    target = posixpath.join("/", posixpath.dirname(base), urllib.parse.unquote(path)) if path else base
    return _normal(target), urllib.parse.unquote(fragment)


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
        document, fragment = _resolved(path, href)
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

    def read(self, root: etree._Element) -> None:
        self._read(root)
        self._end_block()

    def _read(self, top: etree._Element) -> None:
        """All below an element. Without recursion: a book may be nested as deeply as it likes."""
        walk = etree.iterwalk(top, events=("start", "end"))
        for event, element in walk:
            tag = _local_name(element)
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


def _local_name(element: etree._Element) -> str:
    """Without its namespace; "" for what is no element. etree.QName would refuse names that HTML has, such as o:p."""
    return element.tag.rpartition("}")[2].lower() if isinstance(element.tag, str) else ""


def _is_unsaid(element: etree._Element, tag: str) -> bool:
    types = (element.get("{http://www.idpf.org/2007/ops}type") or "").split()
    role = (element.get("role") or "").removeprefix("doc-")
    return tag in _UNSAID or element.get("hidden") is not None or not _UNSAID_TYPES.isdisjoint([*types, role])

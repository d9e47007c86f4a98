"""What scripts/submit_batch.py is made of, without a process or an endpoint: texts, books, rates, ends of jobs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.batch import names
from scripts.batch.books import parts_of, split_evenly
from scripts.batch.checking import typed
from scripts.batch.epub import Book, Chapter, EpubError, read_epub
from scripts.batch.joining import join_subtitles
from scripts.batch.outcomes import Pieces, outcome_of
from scripts.batch.rates import WINDOW_S, Bucket
from scripts.batch.rows import markdown_chapters
from tests.scripts.books import NAV, NCX, page, write_epub, write_pages

# ------------------------------------------------------------------------------------------- books


def test_a_book_is_read_in_the_order_and_by_the_names_of_its_contents(tmp_path: Path) -> None:
    book = read_epub(write_epub(tmp_path / "b.epub", "Fish & Chips", [("One", "First."), ("Two", "Second.")]))
    assert (book.title, book.author, book.language) == ("Fish & Chips", "A. Writer", "en")
    assert book.chapters == (Chapter("One", "First."), Chapter("Two", "Second."))


def test_chapters_begin_at_ids_within_a_document_and_go_on_over_documents(tmp_path: Path) -> None:
    documents = {
        "a.xhtml": page("<p>Before.</p><h2 id='one'>ONE</h2><p>1st.</p><div id='two'><h2>Two</h2><p>Second,</p></div>"),
        "b.xhtml": page("<p>and more.</p>"),
    }
    point = "<navPoint><navLabel><text>{}</text></navLabel><content src='{}'/></navPoint>"
    ncx = NCX.format(points=point.format("One", "a.xhtml#one") + point.format("Two", "a.xhtml#two"))
    book = read_epub(write_pages(tmp_path / "b.epub", documents, ncx=ncx))
    assert book.chapters == (
        Chapter(None, "Before."),
        Chapter("One", "1st."),
        Chapter("Two", "Second,\n\nand more."),
    )


def test_what_is_not_read_out_is_left_out_of_a_book(tmp_path: Path) -> None:
    body = (
        "<p>A&nbsp;word<a epub:type='noteref' href='#n'>1</a> and<br/>another<span epub:type='pagebreak'>12</span>.</p>"
        "<script>no()</script><aside epub:type='footnote' id='n'>A note.</aside><!-- no --><p hidden=''>no</p>"
        "<p><ruby>漢<rt>かん</rt></ruby>caf&eacute; &amp; <em>tea</em></p>"
    )
    book = read_epub(write_pages(tmp_path / "b.epub", {"a.xhtml": page(body)}))
    assert book.chapters[0].text == "A word and another.\n\n漢café & tea"


def test_a_document_that_is_no_valid_xml_is_read_all_the_same(tmp_path: Path) -> None:
    broken = "<html><body><p>Unclosed <b>bold<p>Caf\xe9 & more.</body>".encode()
    book = read_epub(write_pages(tmp_path / "b.epub", {"a.xhtml": broken}))
    assert book.chapters[0].text == "Unclosed bold\n\nCafé & more."


def test_an_entity_of_a_book_reaches_no_file_and_does_not_explode(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden words")
    bomb = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    head = f'<!DOCTYPE html [<!ENTITY x SYSTEM "{secret.as_uri()}"><!ENTITY e0 "boom">{bomb}]>'
    text = head + page("<p>Said. &x; &e11;</p>").split("?>", 1)[1]
    book = read_epub(write_pages(tmp_path / "b.epub", {"a.xhtml": text}))
    assert "hidden" not in book.chapters[0].text and len(book.chapters[0].text) < 100


@pytest.mark.parametrize(
    ("pages", "more", "words"),
    [
        ({"a.xhtml": page("<p> </p>")}, {}, "holds no text"),
        (
            {"a.xhtml": page("<p>x</p>")},
            {"META-INF/encryption.xml": "<e><EncryptionMethod Algorithm='http://www.w3.org/2001/04/xmlenc#aes'/></e>"},
            "encrypted",
        ),
    ],
)
def test_a_book_that_cannot_be_read_says_why(
    tmp_path: Path, pages: dict[str, str], more: dict[str, str], words: str
) -> None:
    with pytest.raises(EpubError, match=words):
        read_epub(write_pages(tmp_path / "b.epub", pages, more=more))


def test_what_is_no_book_says_so(tmp_path: Path) -> None:
    path = tmp_path / "b.epub"
    path.write_bytes(b"no zip")
    with pytest.raises(EpubError, match="not a readable EPUB"):
        read_epub(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(EpubError, match=r"container\.xml is missing"):
        read_epub(path)


PAGE = page("<h2>One</h2><p>Caf&eacute;: a word&#160;or two.</p><p>And <b>more</b>, said &amp; done.</p>")


def members_of(book: Path | io.BytesIO) -> dict[str, bytes]:
    with zipfile.ZipFile(book) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(
    book: Path | io.BytesIO, members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED
) -> None:
    with zipfile.ZipFile(book, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture(scope="module")
def good_book(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    links = "<li><a href='a.xhtml'>One</a></li><li><a href='b.xhtml'>Two</a></li>"
    path = tmp_path_factory.mktemp("good") / "b.epub"
    return write_pages(path, {"a.xhtml": PAGE, "b.xhtml": PAGE * 4}, nav=NAV.format(links=links)).read_bytes()


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut off, cut out, or put in."""
    place = draw.randrange(len(data))
    length = draw.choice((1, 4, 30))
    noise = draw.choice((draw.randbytes(length), bytes(length), b"<" * length, b"&x;", b"\xff\xfe", b"</p>"))
    return draw.choice(
        (
            data[:place] + noise + data[place + len(noise) :],
            data[:place],
            data[:place] + data[place + length :],
            data[:place] + noise + data[place:],
        )
    )


def damaged_members(book: bytes, draw: random.Random) -> bytes:
    """Some files of a book are damaged, have each other's content, or are gone; the archive itself is in order."""
    members = members_of(io.BytesIO(book))
    for name in draw.sample(list(members), draw.randint(1, 2)):
        kind = draw.randrange(8)
        if kind == 0:
            other = draw.choice(list(members))
            members[name], members[other] = members[other], members[name]
        elif kind == 1:
            members[name] = members[name].decode("utf-8", "replace").encode(draw.choice(("utf-16", "cp500", "utf-32")))
        elif kind > 2 or len(members) < 3:
            members[name] = damaged(members[name], draw)
        else:
            del members[name]
    file = io.BytesIO()
    write_members(file, members)
    return file.getvalue()


def damaged_books(book: bytes) -> Iterator[bytes]:
    draw = random.Random(7)
    for _ in range(400):
        yield damaged(book, draw)
        yield damaged_members(book, draw)


def test_a_damaged_book_is_read_or_an_error(tmp_path: Path, good_book: bytes) -> None:
    path = tmp_path / "b.epub"
    num_read, messages = 0, set()
    for data in damaged_books(good_book):
        path.write_bytes(data)
        try:
            book = read_epub(path)
        except EpubError as error:
            messages.add(str(error))
        else:
            assert isinstance(book, Book) and book.chapters
            num_read += 1
    assert 50 < num_read < 750, "some are harmless, and some are not"
    assert all(message.isprintable() and len(message) < 500 for message in messages)
    assert any("damaged" in message for message in messages)


@pytest.mark.parametrize(
    ("compression", "words"), [(zipfile.ZIP_DEFLATED, "damaged"), (zipfile.ZIP_STORED, "damaged: Bad CRC-32")]
)
def test_a_chapter_whose_bytes_are_broken_is_told(tmp_path: Path, compression: int, words: str) -> None:
    path = write_pages(tmp_path / "b.epub", {"a.xhtml": PAGE})
    write_members(path, members_of(path), compression)
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("OEBPS/a.xhtml").header_offset + 30 + len("OEBPS/a.xhtml")
    data = bytearray(path.read_bytes())
    data[begin : begin + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.raises(EpubError, match=rf"^OEBPS/a\.xhtml is {words}"):
        read_epub(path)


def test_an_empty_document_says_nothing_and_the_rest_is_read(tmp_path: Path) -> None:
    empty = {
        "a.xhtml": "",
        "b.xhtml": " \n",
        "c.xhtml": "<!-- no -->",
        "d.xhtml": '<?xml version="1.0"?><!DOCTYPE html>',
    }
    book = read_epub(write_pages(tmp_path / "b.epub", {**empty, "e.xhtml": page("<p>Said.</p>")}))
    assert book.chapters == (Chapter(None, "Said."),)


@pytest.mark.parametrize(
    ("lost", "listed", "instead", "words"),
    [
        ("OEBPS/b.xhtml", "", "", r"^OEBPS/b\.xhtml is missing"),
        ("", 'item id="d1"', 'item id="d9"', "^a document is missing: the manifest has no 'd1'"),
        ("", 'b.xhtml" media-type="', 'b.pdf" media-type="x-', r"^OEBPS/b\.pdf is no document that could be spoken"),
    ],
)
def test_a_book_is_not_read_without_a_chapter_that_it_lacks(
    tmp_path: Path, lost: str, listed: str, instead: str, words: str
) -> None:
    path = write_pages(tmp_path / "b.epub", {"a.xhtml": PAGE, "b.xhtml": PAGE})
    members = members_of(path)
    members["OEBPS/book.opf"] = members["OEBPS/book.opf"].replace(listed.encode(), instead.encode())
    write_members(path, {name: content for name, content in members.items() if name != lost})
    with pytest.raises(EpubError, match=words):
        read_epub(path)


def test_documents_and_ids_are_found_as_addresses_name_them(tmp_path: Path) -> None:
    documents = {"../Text/a%20b.xhtml": page("<h1 id='ö 1'>One</h1><p>1st.</p><p id='z'>2nd.</p>"), "./c.xhtml": PAGE}
    links = (
        "<li><a href='../Text/./a%20b.xhtml#%C3%B6%201'>First</a></li><li><a href='../Text/a%20b.xhtml#z'>2</a></li>"
    )
    path = write_pages(tmp_path / "b.epub", documents, nav=NAV.format(links=links))
    names = {"OEBPS/../Text/a%20b.xhtml": "Text/a b.xhtml", "OEBPS/./c.xhtml": "OEBPS/c.xhtml"}
    write_members(path, {names.get(name, name): content for name, content in members_of(path).items()})
    chapters = read_epub(path).chapters
    assert [chapter.title for chapter in chapters] == ["First", "2"]
    assert chapters[0].text == "One\n\n1st." and chapters[1].text.startswith("2nd.\n\nOne\n\nCafé")


def test_a_document_that_the_spine_names_twice_is_read_once(tmp_path: Path) -> None:
    path = write_pages(tmp_path / "b.epub", {"a.xhtml": PAGE})
    members = members_of(path)
    again = b'<item id="e" href="./a.xhtml" media-type="application/xhtml+xml"/></manifest>'
    twice = members["OEBPS/book.opf"].replace(b"</manifest>", again)
    twice = twice.replace(b"</spine>", b'<itemref idref="d0"/><itemref idref="e"/></spine>')
    write_members(path, {**members, "OEBPS/book.opf": twice})
    assert len(read_epub(path).chapters) == 1


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("<?xml version='1.0' encoding='utf-16'?>", "utf-16"),
        ("", "utf-16"),
        ("<?xml version='1.0'?>", "utf-16-be"),
        ("<?xml version='1.0' encoding='iso-8859-1'?>", "cp1252"),
        ("<?xml version='1.0' encoding='no-such'?>", "utf-8"),
        ("<?xml version='1.0' encoding='idna'?>", "utf-8"),
        ("", "cp1252"),
        ("", "utf-8-sig"),
    ],
)
@pytest.mark.parametrize("body", ["<p>“Café”&nbsp;bar</p>", "<p>“Café”&nbsp;<b>bar<p>"], ids=["xml", "html"])
def test_a_document_is_read_in_its_encoding(tmp_path: Path, declared: str, encoding: str, body: str) -> None:
    text = f"{declared}<html><head><title>On encoding and charset</title></head><body>{body}</body></html>"
    book = read_epub(write_pages(tmp_path / "b.epub", {"a.xhtml": text.encode(encoding)}))
    assert book.chapters[0].text == "“Café” bar"


@pytest.mark.parametrize(
    "body",
    [
        "<p>A <!-- no -->word</p>",
        "<p>A <?no?>word</p>",
        "<p>A <!-- no -->word<p>",
        "<p>A <?no?>word<p>",
        "<p>A <o:p></o:p>word<p>",
        f"<p>A {'<i>' * 300}word{'</i>' * 300}</p>",
        f"<p>A {'<i>' * 1900}word<p>",
    ],
    ids=["comment", "instruction", "comment in html", "instruction in html", "name", "deep", "deep in html"],
)
def test_no_word_is_lost_for_what_stands_before_it(tmp_path: Path, body: str) -> None:
    book = read_epub(write_pages(tmp_path / "b.epub", {"a.xhtml": page(body)}))
    assert book.chapters[0].text == "A word"


def test_a_document_that_cannot_be_read_to_its_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EpubError, match=r"a\.xhtml cannot be read: Excessive depth"):
        read_epub(write_pages(tmp_path / "b.epub", {"a.xhtml": page(f"<p>A{'<i>' * 3000} word</p>")}))


def test_a_page_that_is_only_a_heading_is_a_chapter(tmp_path: Path) -> None:
    links = "<li><a href='a.xhtml'>Part One</a></li><li><a href='b.xhtml'>Cover</a></li>"
    documents = {"a.xhtml": page("<h1>Part One</h1>"), "b.xhtml": page("<p><img src='x'/></p>"), "c.xhtml": PAGE}
    book = read_epub(write_pages(tmp_path / "b.epub", documents, nav=NAV.format(links=links)))
    assert [chapter.title for chapter in book.chapters] == ["Part One", "Cover"]


def test_a_nav_is_read_to_the_level_of_chapters(tmp_path: Path) -> None:
    links = (
        "<li><a href='a.xhtml'>Part</a><ol><li><a href='a.xhtml#c'>Chapter</a>"
        "<ol><li><a href='a.xhtml#s'>Section</a></li></ol></li></ol></li>"
    )
    body = "<p>Intro.</p><p id='c'>Text.</p><p id='s'>More.</p>"
    book = read_epub(write_pages(tmp_path / "b.epub", {"a.xhtml": page(body)}, nav=NAV.format(links=links)))
    assert book.chapters == (Chapter("Part", "Intro."), Chapter("Chapter", "Text.\n\nMore."))


@given(st.lists(st.integers(1, 120), min_size=1, max_size=60), st.integers(60, 400))
@settings(max_examples=60, deadline=None)
def test_parts_hold_all_of_a_text_and_are_never_too_long(lengths: list[int], max_chars: int) -> None:
    text = " ".join(f"{'word ' * (length // 5 + 1)}end." for length in lengths)
    parts = list(split_evenly(text, "en", max_chars))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(0 < len(part) <= max_chars for part in parts)


def test_parts_end_with_sentences_and_are_about_the_same_length() -> None:
    text = "The ferry crossed the bay. " * 100
    parts = list(split_evenly(text, "en", 1000))
    assert len(parts) == 3 and all(part.endswith(".") and part.startswith("The") for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) < 60


def test_a_chapters_title_is_said_and_marks_its_first_part_only() -> None:
    parts = list(parts_of([Chapter("One", "A word. " * 300), Chapter(None, "Two."), Chapter("***", "")], "en", 1500))
    assert [part.title for part in parts] == ["One", None, "Part 2"]
    assert parts[0].text.startswith("One.\n\nA word.")


def test_markdown_is_read_without_its_marks_in_chapters_of_its_headings() -> None:
    text = "Intro.\n\n# One *day*\n\nText with `code`\nand [a link](x).\n\n### Deep\n\n```\nno\n```\n# Two\n\n> Said.\n"
    assert markdown_chapters(text) == (
        Chapter(None, "Intro."),
        Chapter("One day", "Text with code and a link.\n\nDeep"),
        Chapter("Two", "Said."),
    )


def test_joined_subtitles_are_those_of_the_parts_later() -> None:
    one = "1\n00:00:00,500 --> 00:00:01,000\nOne --> not a time\n\n"
    two = "1\n00:59:59,900 --> 01:00:00,100\nTwo\nlines\n\n2\n01:00:01,000 --> 01:00:02,000\nThree\n\n"
    assert join_subtitles([one, two], [2.25, 9.0], ".srt") == (
        "1\n00:00:00,500 --> 00:00:01,000\nOne --> not a time\n\n"
        "2\n01:00:02,150 --> 01:00:02,350\nTwo\nlines\n\n3\n01:00:03,250 --> 01:00:04,250\nThree\n"
    )
    vtt = [f"WEBVTT\n\n{text.replace(',', '.').split(chr(10), 1)[1]}" for text in (one, two)]
    assert join_subtitles(vtt, [2.25, 9.0], ".vtt").startswith("WEBVTT\n\n00:00:00.500 --> 00:00:01.000\n")


# ------------------------------------------------------------------------------------------- rates


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.floats(0.0, 3.0), min_size=1, max_size=60), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_no_window_of_ten_seconds_holds_more_requests_than_the_limit(idle_s: list[float], most: int) -> None:
    clock = Clock()

    async def sent() -> list[float]:
        bucket, times_s = Bucket(most, clock), []
        for pause_s in idle_s:
            clock.now_s += pause_s
            for _ in range(3):
                clock.now_s += bucket.wait_s()
                await bucket.take()
                times_s.append(clock.now_s)
        return times_s

    times_s = asyncio.run(sent())
    for first, begin_s in enumerate(times_s):
        assert sum(each < begin_s + WINDOW_S for each in times_s[first:]) <= most


def test_a_limit_that_was_hit_pauses_all_requests_of_its_kind() -> None:
    clock = Clock()

    async def waits_s() -> tuple[float, float]:
        bucket = Bucket(1000, clock)
        before_s = bucket.wait_s()
        bucket.pause(3.0)
        return before_s, bucket.wait_s()

    before_s, after_s = asyncio.run(waits_s())
    assert before_s == 0.0 and after_s == pytest.approx(3.0, abs=0.02)


# ------------------------------------------------------------------------------------------- ends of jobs


@pytest.mark.parametrize(
    ("answer", "code", "may_pass"),
    [
        ({"status": "FAILED", "error": "x", "output": {"error_code": "voice_not_found"}}, "voice_not_found", False),
        ({"status": "FAILED", "error": "x", "output": {"error_code": "out_of_memory"}}, "out_of_memory", True),
        ({"status": "FAILED", "error": json.dumps({"error": "x", "error_code": "text_empty"})}, "text_empty", False),
        ({"status": "FAILED", "error": json.dumps({"error_type": "E", "error_message": "x"})}, "internal", True),
        ({"status": "FAILED", "error": "the job lost its worker"}, "internal", True),
        ({"status": "CANCELLED"}, "cancelled", True),
        ({"status": "TIMED_OUT", "error": "too long"}, "timed_out", True),
        ({"status": "COMPLETED", "output": []}, "no_result", True),
        ({"status": "COMPLETED"}, "no_result", True),
        ({"status": "SOMETHING_NEW"}, "internal", True),
    ],
)
def test_an_end_without_a_result_has_a_code_and_says_whether_it_may_pass(
    answer: dict[str, Any], code: str, may_pass: bool
) -> None:
    outcome = outcome_of(answer)
    assert outcome.result is None and outcome.failure is not None
    assert (outcome.failure.code, outcome.failure.may_pass) == (code, may_pass)


def test_pieces_are_joined_in_order_and_a_gap_is_found() -> None:
    def piece(seq: int, audio: bytes = b"", **more: Any) -> dict[str, Any]:
        return {"seq": seq, "audio": base64.b64encode(audio).decode(), "format": "mp3", **more}

    pieces = Pieces()
    for each in (piece(0, b"ab"), piece(1, b"c"), piece(2, chunks=[1]), piece(3, chunks=[2], final=True, seed=7)):
        assert not pieces.is_whole
        pieces.add(each)
    assert pieces.is_whole and b"".join(pieces.audio) == b"abc"
    assert pieces.result["chunks"] == [1, 2] and pieces.result["seed"] == 7
    for damaged in (piece(1, chunks=None), {**piece(1), "audio": "no base64!"}, {**piece(1), "audio": 7}):
        broken = Pieces()
        for each in (piece(0, chunks=[1]), damaged):
            broken.add(each)
        assert broken.failure is not None and broken.failure.may_pass and not broken.is_whole
    gap = Pieces()
    gap.add(piece(0, b"a"))
    gap.add(piece(2, b"c", final=True))
    assert gap.failure is not None and gap.failure.may_pass and not gap.is_whole


# ------------------------------------------------------------------------------------------- keys and values


@given(st.text(min_size=1, max_size=400))
def test_any_key_is_a_safe_file_name(key: str) -> None:
    stem = names.stem_of(key)
    assert 0 < len(stem.encode("utf-8", "strict")) <= names.MAX_STEM_BYTES + 1
    assert not set(stem) & set('/\\:*?"<>|\0\n') and stem[0] != "." and stem[-1] != "." and stem.isprintable()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "7", 7),
        ("seed", "seven", "seven"),
        ("temperature", "0.5", 0.5),
        ("cfg", "0.5", 0.5),
        ("save_to_library", "TRUE", True),
        ("text", "7", "7"),
        ("output_format", "mp3", "mp3"),
        ("pronunciations", '{"a": "b"}', {"a": "b"}),
        ("segments", '[{"text": "x"}]', [{"text": "x"}]),
    ],
)
def test_a_cell_stands_for_what_the_schema_wants(name: str, text: str, value: object) -> None:
    assert typed(name, text) == value

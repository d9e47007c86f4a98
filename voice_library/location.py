"""From what a person writes (a folder, file:// or s3://) to a store."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from voice_library.errors import LibraryError
from voice_library.folder_store import FolderStore
from voice_library.s3_store import S3Options, S3Store
from voice_library.store import Store, is_key

_FOLDER_REFRESH_S = 1.0
_BUCKET_REFRESH_S = 5.0
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def open_store(uri: str | Path, s3: S3Options | None = None) -> tuple[Store, float]:
    """The store of a URI, and how old a list of what it holds may get, seconds: asking a bucket costs more.

    Raises:
        LibraryError: invalid_request (uri), storage_failed when it is a file and no folder.
    """
    text = str(uri)
    if isinstance(uri, Path) or "://" not in text:
        return _folder(text), _FOLDER_REFRESH_S
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _folder(unquote(parts.path)), _FOLDER_REFRESH_S
    prefix = parts.path.strip("/")
    is_bucket = parts.scheme == "s3" and _BUCKET.fullmatch(parts.netloc) and (not prefix or is_key(prefix))
    if is_bucket and not parts.query and not parts.fragment:
        return S3Store(parts.netloc, prefix, s3), _BUCKET_REFRESH_S
    raise _wrong(text)


def _folder(text: str) -> FolderStore:
    if not text or "\0" in text:
        raise _wrong(text)
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise LibraryError("storage_failed", f"{path} is a file; a voice library is a folder")
    return FolderStore(path)


def _wrong(text: str) -> LibraryError:
    message = f"expected a folder, file:///folder or s3://bucket/prefix (letters, digits, '.', '_', '-'), got {text!r}"
    return LibraryError("invalid_request", message, "uri")

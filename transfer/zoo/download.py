"""Download a file: with progress, continued after a cut, checked, and never half of it under its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mixmask.engine.errors import DataError, RunFailure
from mixmask.engine.progress import say
from mixmask.engine.storage import write_text
from mixmask.engine.wording import printable

CHUNK = 1 << 20
ATTEMPTS = 5
SAY_EVERY_SECONDS = 10.0
AGENT = "mixmask"


@dataclass(frozen=True)
class Digests:
    """What is published of a file: whole digests or their first hexadecimal digits; None where nothing is."""

    sha256: str | None = None
    md5: str | None = None

    @property
    def any(self) -> bool:
        """Whether there is something to check."""
        return self.sha256 is not None or self.md5 is not None


def fetch_file(url: str, target: Path, digests: Digests = Digests(), wait: float = 1.0) -> Path:
    """Download ``url`` to ``target``, unless it is there.

    A download that breaks off is continued, now and by the next call. Where no digest is published, the one seen first is
    kept in ``<target>.json``, and another file later under the same address is refused. Several processes may ask for
    the same file: one downloads, the others wait.

    Args:
        url: http or https.
        target: The file to write.
        digests: What the publisher says of the file.
        wait: Seconds before the second attempt; doubled for each further one.

    Raises:
        DataError: If the address is wrong, or the file is not the published one.
        RunFailure: If the network or the disk fails.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.is_file():
                part = _continued(url, target, wait)
                _check(part, target, url, digests)
                os.replace(part, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full; what was downloaded is kept" if full else error.strerror or str(error)
        raise RunFailure(f"{target}: cannot be written: {what}") from None
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Only one process at a time, on this machine and where the file system has locks."""
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some network drives have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _continued(url: str, target: Path, wait: float) -> Path:
    """The downloaded file, under the name ``<target>.part``."""
    part = target.with_name(f"{target.name}.part")
    last: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        before = part.stat().st_size if part.is_file() else 0
        try:
            _receive(url, part)
            return part
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what we have is not a beginning of what is there now
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise DataError(f"{url}: {error.code} {printable(str(error.reason))}") from None
            last = error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
                raise reason from None
            last = error
        gained = (part.stat().st_size if part.is_file() else 0) - before
        if attempt + 1 < ATTEMPTS:
            say(f"{printable(str(last))}; " + (f"{gained:,} bytes arrived; " if gained > 0 else "") + "trying again")
    kept = f"; {part} keeps what arrived, and the next attempt continues it" if part.is_file() else ""
    raise RunFailure(f"{url}: not reached after {ATTEMPTS} attempts ({printable(str(last))}){kept}") from None


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects that do not leave encryption."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise DataError(f"{req.full_url}: leads to {printable(newurl)}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(url: str, part: Path) -> None:
    """Append what is missing to ``part``; raise if the connection ends before the announced length."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{url}: an address that begins with https:// or http:// was expected")
    mark = part.with_name(f"{part.name}.etag")
    have = part.stat().st_size if part.is_file() and mark.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": AGENT})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark.read_text(encoding="utf-8"))  # if it has changed, all of it comes
    opener = urllib.request.build_opener(_SafeRedirects)
    with opener.open(request, timeout=60) as answer:
        if answer.status != 206:
            have = 0
        kind = answer.headers.get_content_type()
        if kind == "text/html":
            raise DataError(f"{url}: answers with a web page, not with a file; open it in a browser")
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):  # weak ones do not identify bytes
            write_text(mark, tag)
        else:
            mark.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdigit() else None
        _require_space(part, None if total is None else total - have)
        with part.open("ab" if have else "wb") as file:
            _copy(answer, file, part.name.removesuffix(".part"), have, total)
    if total is not None and part.stat().st_size < total:
        raise http.client.IncompleteRead(b"", total - part.stat().st_size)


def _require_space(part: Path, needed: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed is not None and needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")


def _copy(answer: Any, file: IO[bytes], name: str, have: int, total: int | None) -> None:
    said = time.monotonic()
    while chunk := answer.read(CHUNK):
        file.write(chunk)
        have += len(chunk)
        if time.monotonic() - said > SAY_EVERY_SECONDS or have == total:
            said = time.monotonic()
            of = f" of {total / 1e6:,.1f}" if total else ""
            say(f"{name}: {have / 1e6:,.1f}{of} MB")


def _check(part: Path, target: Path, url: str, digests: Digests) -> None:
    """Compare the file with what is published or with what was seen before; a wrong one is removed."""
    seen_file = target.with_name(f"{target.name}.json")
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
    found = {"sha256": sha256.hexdigest(), "md5": md5.hexdigest()}
    published = {"sha256": digests.sha256, "md5": digests.md5}
    wrong = [kind for kind, digest in published.items() if digest and not found[kind].startswith(digest)]
    before = _seen(seen_file)
    problem = ""
    if wrong:
        problem = f"its {wrong[0]} is {found[wrong[0]]}, and {published[wrong[0]]} is published"
    elif not digests.any and before is not None and before != found["sha256"]:
        problem = f"its sha256 is {found['sha256']}, and {before} was seen before; delete {seen_file} to accept it"
    if problem:
        size = part.stat().st_size
        for file_name in (part, part.with_name(f"{part.name}.etag")):
            file_name.unlink(missing_ok=True)
        raise DataError(f"{url}: not the file that was expected: {problem} ({size:,} bytes; not kept)")
    part.with_name(f"{part.name}.etag").unlink(missing_ok=True)
    write_text(seen_file, json.dumps({"url": url, **found, "published": published}, indent=1) + "\n")
    if not digests.any:
        say(f"{target.name}: no digest is published; sha256 {found['sha256']} was recorded")


def _seen(file: Path) -> str | None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return str(document["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""Downloads from a server that cuts, redirects, lies, and fills the disk."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mixmask.engine.errors import DataError, RunFailure
from mixmask.transfer.zoo import download
from mixmask.transfer.zoo.download import Digests, _SafeRedirects, fetch_file
from tests.transfer.file_server import CONTENT, SHA256, Handler, failing, serving, whole


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    with serving() as running:
        yield running


def test_a_file_is_downloaded_once_and_its_digest_recorded(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    target = tmp_path / "zoo" / "x" / "weights.pth"
    assert fetch_file(url, target) == target
    assert fetch_file(url, target).read_bytes() == CONTENT
    assert len(handler.asked) == 1
    seen = json.loads((target.parent / "weights.pth.json").read_text())
    assert (seen["url"], seen["sha256"]) == (url, SHA256)
    assert {file.name for file in target.parent.iterdir()} == {"weights.pth", "weights.pth.json", "weights.pth.lock"}


def test_cut_connections_are_continued(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    handler.script[:] = [whole(cut=1_500_000), whole(cut=2_000_000), failing(503), whole()]
    fetch_file(url, tmp_path / "w.pth", Digests(SHA256[:8]), wait=0.01)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert [one.get("range") for one in handler.asked] == [None, "bytes=1500000-", "bytes=3500000-", "bytes=3500000-"]


def test_a_later_call_continues_what_an_earlier_one_left(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    handler.script[:] = [whole(cut=1_000_000), failing(500)]
    with pytest.raises(RunFailure, match=r"not reached after 5 attempts .* keeps what arrived"):
        fetch_file(url, tmp_path / "w.pth", wait=0.001)
    assert not (tmp_path / "w.pth").exists()
    handler.script[:] = [whole()]
    fetch_file(url, tmp_path / "w.pth")
    assert handler.asked[-1]["range"] == "bytes=1000000-"
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("etags", [('"one"', '"two"'), (None, None), ('W/"one"', 'W/"one"')])
def test_a_file_that_changed_or_says_nothing_of_itself_is_begun_anew(
    etags: tuple[str | None, str | None], server: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    url, handler = server
    old = bytes(len(CONTENT))
    handler.script[:] = [whole(old, etags[0], cut=1_000_000), whole(CONTENT, etags[1])]
    fetch_file(url, tmp_path / "w.pth", wait=0.001)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "digests",
    [Digests(sha256="0" * 64), Digests(sha256="00000000"), Digests(md5="deadbeef"), Digests(SHA256, "deadbeef")],
)
def test_a_wrong_file_is_refused_and_not_kept(
    digests: Digests, server: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    url, _ = server
    with pytest.raises(DataError, match=r"not the file that was expected: its (sha256|md5) is .* is published"):
        fetch_file(url, tmp_path / "w.pth", digests)
    assert {file.name for file in tmp_path.iterdir()} == {"w.pth.lock"}


def test_another_file_than_the_one_seen_first_is_refused(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    fetch_file(url, tmp_path / "w.pth").unlink()
    handler.script[:] = [whole(b"other" * 1000)]
    with pytest.raises(DataError, match=r"was seen before; delete .*w\.pth\.json to accept it"):
        fetch_file(url, tmp_path / "w.pth")
    (tmp_path / "w.pth.json").unlink()
    assert fetch_file(url, tmp_path / "w.pth").read_bytes() == b"other" * 1000


def test_a_full_disk(server: tuple[str, type[Handler]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, handler = server
    nearly = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: nearly)
        with pytest.raises(RunFailure, match=r"cannot be written: the disk is full"):
            fetch_file(url, tmp_path / "w.pth")
    copy = download._copy

    def filling(answer: Any, file: Any, *more: Any) -> None:
        file.write(answer.read(1_000_000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "_copy", filling)
        with pytest.raises(RunFailure, match=r"the disk is full; what was downloaded is kept"):
            fetch_file(url, tmp_path / "w.pth", wait=0.001)
    assert download._copy is copy
    fetch_file(url, tmp_path / "w.pth")  # after space was made
    assert handler.asked[-1]["range"] == "bytes=1000000-"
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_redirects(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server

    def elsewhere(one: Handler) -> None:
        one.send_response(302)
        one.send_header("Location", "/moved.pth")
        one.end_headers()

    handler.script[:] = [elsewhere, whole()]
    fetch_file(url, tmp_path / "w.pth")
    assert [one["path"] for one in handler.asked] == ["/weights.pth", "/moved.pth"]
    request = download.urllib.request.Request("https://somewhere/x")
    with pytest.raises(DataError, match="not encrypted"):
        _SafeRedirects().redirect_request(request, None, 302, "", {}, "http://somewhere/x")
    handler.script[:] = [elsewhere]  # for ever
    with pytest.raises((DataError, RunFailure)):
        fetch_file(url, tmp_path / "loop.pth", wait=0.001)


def test_answers_that_are_no_file(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server

    def page(one: Handler) -> None:
        one.send_response(200)
        one.send_header("Content-Type", "text/html; charset=utf-8")
        one.end_headers()
        one.wfile.write(b"<html>quota exceeded")

    for answer, message in ((page, "a web page"), (failing(404), "404"), (failing(403), "403")):
        handler.script[:] = [answer]
        with pytest.raises(DataError, match=message):
            fetch_file(url, tmp_path / "w.pth")
    with pytest.raises(DataError, match="begins with https://"):
        fetch_file("file:///etc/passwd", tmp_path / "w.pth")
    assert {file.name for file in tmp_path.iterdir()} == {"w.pth.lock"}


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(RunFailure, match="not reached after 5 attempts"):
        fetch_file("http://127.0.0.1:9/x.pth", tmp_path / "w.pth", wait=0.001)


def test_several_at_once_download_once(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch_file(url, tmp_path / "w.pth").read_bytes(), range(4)))
    assert found == [CONTENT] * 4
    assert len(handler.asked) == 1

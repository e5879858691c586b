"""The served page: what it says of runs that train, stand still or finish, and to whom."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixmask.engine import ownership
from mixmask.engine.errors import DataError, UserError
from mixmask.engine.storage import RunDirectory
from mixmask.evaluate.collect import collect
from mixmask.launch.live.server import LivePage, open_server
from mixmask.launch.live.state import LiveState, unfinished_run
from tests.evaluate.made import backbone, transfer, write
from tests.needs import needed_browser


def begin(folder: Path, steps: int = 4, of: int = 10) -> RunDirectory:
    """A run directory as a run leaves it after some steps."""
    folder.mkdir(parents=True)
    directory = RunDirectory(folder)
    directory.recipe_file.write_text("")
    lines = [{"step": n, "of": of, "loss": 9.0 - n, "seconds": float(n), "lr": 0.1} for n in range(1, steps + 1)]
    directory.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def owned(directory: RunDirectory, pid: int) -> None:
    directory.owner_file.write_text(
        json.dumps(
            {"token": "t", "pid": pid, "machine": ownership._machine(), "beat": 1, "restart": "r", "job": None,
             "user": "me", "host": "here"}
        )
    )  # fmt: skip


def ended_process() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_states_of_unfinished_runs(tmp_path: Path) -> None:
    running, stale, _ = (begin(tmp_path / "pretrain" / name) for name in ("a", "b", "c"))
    owned(running, os.getpid())
    owned(stale, ended_process())
    found = {name: unfinished_run(tmp_path / "pretrain" / name) for name in "abc"}
    assert [found[name].state for name in "abc"] == ["running", "stale", "stopped"]
    assert found["a"].share == 0.4
    assert "40 %" in found["a"].detail
    assert "no sign of life for " in found["b"].detail
    assert "resume" in found["c"].detail
    assert found["a"].curves == {"loss": [(1.0, 8.0), (2.0, 7.0), (3.0, 6.0), (4.0, 5.0)]}
    assert unfinished_run(tmp_path / "pretrain" / "absent").detail == "not started"


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    begin(tmp_path / "long", steps=1_001, of=2_000)
    points = unfinished_run(tmp_path / "long").curves["loss"]
    assert len(points) <= 201
    assert points[-1][0] == 1_001


def test_the_version_changes_with_finished_runs_only(tmp_path: Path) -> None:
    write([backbone()], tmp_path)
    state = LiveState(tmp_path)
    before = state.version(collect(tmp_path))
    begin(tmp_path / "pretrain" / "going")
    assert state.version(collect(tmp_path)) == before
    write([transfer(backbone(), "knn", {"knn/top1": 50.0})], tmp_path)
    assert state.version(collect(tmp_path)) != before


def test_a_damaged_launch_file_is_said_on_the_page(tmp_path: Path) -> None:
    place = tmp_path / "suites" / "s" / "launches" / "x"
    place.mkdir(parents=True)
    (place / "launch.json").write_text("{")
    (suite,) = LiveState(tmp_path).suites()
    assert "damaged" in suite.problem


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of runs and the address of its page."""
    runs = tmp_path / "runs"
    write([backbone(), transfer(backbone(), "knn", {"knn/top1": 50.0})], runs)
    with open_server(LivePage(runs), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield runs, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_what_is_served_and_to_whom(served: tuple[Path, str]) -> None:
    _, url = served
    code, page = get(url + "/")
    assert code == 200
    assert 'id="live"' in page
    assert "connect-src 'self'" in page
    code, state = get(url + "/state.json?x")
    assert code == 200
    assert json.loads(state)["runs"] == []
    assert json.loads(state)["version"] in page
    assert get(url + "/../../etc/passwd")[0] == 404
    assert get(url + "/", Host="evil.example")[0] == 403  # a foreign name that was made to point here
    request = urllib.request.Request(url + "/", method="POST", data=b"")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(request, timeout=60)


@pytest.mark.slow
def test_a_folder_that_disappears_is_reported_and_does_not_end_the_server(served: tuple[Path, str]) -> None:
    runs, url = served
    get(url + "/state.json")
    shutil.rmtree(runs)
    deadline = time.monotonic() + 30
    while (answer := get(url + "/state.json"))[0] != 500:
        assert time.monotonic() < deadline
    assert "no such folder of runs" in answer[1]


def test_a_reader_who_leaves_early_leaves_no_traceback(
    served: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with open_server(LivePage(served[0]), "127.0.0.1", 0) as server:
        for error, words in ((BrokenPipeError(), ""), (ValueError("ours"), "ours")):
            try:
                raise error
            except (ConnectionError, ValueError):
                server.handle_error(None, ("127.0.0.1", 1))
            said = capsys.readouterr()
            assert (said.out + said.err).endswith(f"{words}\n" + "-" * 40 + "\n" if words else "")
            assert bool(said.out + said.err) == bool(words)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of runs"):
        LivePage(tmp_path / "absent").page()
    assert b"0 pretraining and 0 transfer runs" in LivePage(tmp_path).page()  # an empty folder has a page
    page = LivePage(tmp_path)
    with open_server(page, "127.0.0.1", 0) as server:
        port = server.server_address[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: .*in use; --port 0"):
            open_server(page, "127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen on no"):
        open_server(page, "no.such.host.invalid", 0)


@pytest.mark.real
def test_the_page_grows_in_a_browser(served: tuple[Path, str]) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    found = needed_browser()
    runs, url = served
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        heard: list[str] = []
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.goto(url)
        page.wait_for_function("() => document.getElementById('live-note').textContent === 'No run is under way.'")
        page.fill("#search", "knn")
        page.locator("#run-table tbody tr:visible input").first.check()
        owned(begin(runs / "pretrain" / "young"), os.getpid())
        card = page.locator("#live-runs .card.running")
        card.wait_for(timeout=30_000)
        assert "young" in card.inner_text()
        assert card.locator("polyline").count() == 1
        owned(RunDirectory(runs / "pretrain" / "young"), ended_process())
        page.locator("#live-runs .card.stale").wait_for(timeout=30_000)
        write([transfer(backbone(method="vanilla"), "knn", {"knn/top1": 41.5})], runs)  # a run finishes
        page.wait_for_function(
            "() => document.getElementById('count').textContent.endsWith('of 3 runs')", timeout=30_000
        )
        assert page.input_value("#search") == "knn"  # what the reader had chosen stays
        assert page.locator("#run-table input:checked").count() == 1
        assert "41.5" in page.locator("#tables").inner_text()
        browser.close()
    assert heard == []

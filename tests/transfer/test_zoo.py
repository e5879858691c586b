"""Known checkpoints: the catalogue, downloads from a server that misbehaves, and what a run makes of an entry."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.torch import load_file

from mixmask.engine.builtin_configs import config_file
from mixmask.engine.errors import ConfigError, DataError, RunFailure, UserError
from mixmask.transfer.checkpoints.layouts import LAYOUTS
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.zoo import catalogue as catalogue_module
from mixmask.transfer.zoo import download
from mixmask.transfer.zoo.catalogue import ZooEntry, catalogue, known_checkpoint
from mixmask.transfer.zoo.download import Digests, _SafeRedirects, fetch_file
from mixmask.transfer.zoo.references import locate_checkpoint, zoo_path
from tests.transfer.checkpoint_files import moco_checkpoint

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()

# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_entry_can_be_used() -> None:
    entries = catalogue()
    assert len(entries) > 100
    assert len({entry.url for entry in entries.values() if not entry.by_hand}) == sum(
        not entry.by_hand for entry in entries.values()
    )
    for entry in entries.values():
        assert entry.url.startswith("https://"), entry.name
        assert entry.repository.startswith("https://github.com/"), entry.name
        if entry.keys and entry.arch.startswith("resnet"):
            fits = [layout.name for layout in LAYOUTS if re.fullmatch(layout.trunk, entry.keys)]
            assert fits or entry.prefix, f"{entry.name}: no layout has the prefix {entry.keys}"
        for number in entry.published:
            assert (number.config is None) == (number.metric is None), (entry.name, number.what)
            if number.config is not None:
                recipe = load_transfer_recipe(
                    config_file(Path(number.config), "transfer"), ["backbone=x", "data.root=x"]
                )
                assert number.metric in recipe.headlines, (entry.name, number.config, number.metric)


def test_the_systems_that_the_issue_names_are_there() -> None:
    titles = {entry.title for entry in catalogue().values()}
    wanted = {
        "MoCo v1", "MoCo v2", "MoCo v3", "SimCLR", "BYOL", "SwAV", "SimSiam", "Barlow Twins", "VICReg", "DINO",
        "DenseCL", "PixPro", "DetCo", "Supervised",
    }  # fmt: skip
    assert wanted <= titles
    publishers = {entry.repository.rsplit("/", 1)[-1] for entry in catalogue().values()}
    assert {"vision", "pytorch-image-models"} <= publishers


def test_what_moco_states() -> None:
    entry = known_checkpoint("mocov2-800ep")
    numbers = {number.what: number.value for number in entry.published}
    assert numbers["ImageNet linear top-1"] == 71.1
    assert numbers["VOC 2007 box AP"] == 57.4
    assert entry.md5 == "a04e12f8"
    assert entry.file_name == "moco_v2_800ep_pretrain.pth.tar"


def test_an_unknown_name_gets_the_closest_ones() -> None:
    with pytest.raises(UserError, match=r"zoo:mocov2-800: no such checkpoint\. Closest: mocov2-800ep"):
        locate_checkpoint("zoo:mocov2-800")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoints: {A B: {}}", "no name"),
        ("checkpoints: {a: {title: A, framework: a, arch: resnet50, url: ftp://x}}", "a.url"),
        ("checkpoints: {a: {title: A, framework: a, arch: resnet50, url: http://x, sha256: XYZ}}", "a.sha256"),
        ("checkpoints: {a: {framework: a, arch: resnet50, url: http://x}}", "a.title"),
    ],
)
def test_a_malformed_file_is_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "repository: https://github.com/a/b\nlicence: MIT\nread_in: [README.md]\n"
    monkeypatch.setattr(catalogue_module, "_files", lambda: iter([("lab/x.yaml", head + text)]))
    with pytest.raises(ConfigError, match=r"lab/x\.yaml") as caught:
        catalogue.__wrapped__()
    assert message in str(caught.value)


# --- labels and expectations -----------------------------------------------------------------------------------------


def recipe_of(config: str, *overrides: str) -> Any:
    overrides = ("backbone=zoo:mocov2-800ep", "data.root=somewhere", *overrides)
    return load_transfer_recipe(config_file(Path(config), "transfer"), overrides)


def test_a_checkpoint_labels_its_results_and_brings_the_numbers_that_it_should_reproduce() -> None:
    entry = known_checkpoint("mocov2-800ep")
    labelled = entry.labelled(recipe_of("detect_voc", "seed=3", "engine=detectron2"))
    assert (labelled.framework, labelled.method, labelled.pretrain_epochs) == ("mocov2", "vanilla", 800)
    assert labelled.pretrain_data == "imagenet1k"
    assert {(one.metric, one.value, one.tolerance) for one in labelled.expected} <= {
        ("bbox/AP", 57.4, 0.5), ("bbox/AP50", 82.5, 0.5), ("bbox/AP75", 64.0, 0.8),
    }  # fmt: skip
    of_shipped = entry.labelled(recipe_of("detect_voc", "seed=3"))
    assert len(of_shipped.expected) == 3
    assert "facebookresearch/moco" in of_shipped.expected[0].source
    assert [one.value for one in entry.labelled(recipe_of("linear")).expected] == [71.1]


def test_a_changed_protocol_expects_nothing_and_own_labels_stay() -> None:
    entry = known_checkpoint("mocov2-800ep")
    assert entry.labelled(recipe_of("detect_voc", "iterations=100")).expected == ()
    assert entry.labelled(recipe_of("linear", "lr=1")).expected == ()
    assert entry.labelled(recipe_of("linear_swav")).expected == ()
    own = entry.labelled(recipe_of("linear", "method=mine", "pretrain_epochs=3"))
    assert (own.method, own.pretrain_epochs, own.framework) == ("mine", 3, "mocov2")


# --- downloads -------------------------------------------------------------------------------------------------------

Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the test's script says, one entry per request; the last one repeats."""

    script: list[Answer]
    asked: list[dict[str, str]]

    def do_GET(self) -> None:
        self.asked.append({"path": self.path, **{key.lower(): value for key, value in self.headers.items()}})
        (self.script.pop(0) if len(self.script) > 1 else self.script[0])(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def whole(content: bytes = CONTENT, etag: str | None = '"one"', cut: int | None = None) -> Answer:
    """The file, from where it is asked for if the ETag fits; ``cut`` ends the connection after so many bytes."""

    def answer(handler: Handler) -> None:
        start = 0
        asked = handler.headers.get("Range")
        if asked and etag is not None and handler.headers.get("If-Range") == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start > len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("Content-Type", "application/octet-stream")
        if etag is not None:
            handler.send_header("ETag", etag)
        handler.end_headers()
        handler.wfile.write(content[start : start + cut] if cut is not None else content[start:])
        if cut is not None:
            handler.close_connection = True

    return answer


def failing(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    """The address of a file, and the handler whose script says how it is served."""
    handler = type("Scripted", (Handler,), {"script": [whole()], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/weights.pth", handler
        running.shutdown()
        thread.join()


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


# --- references ------------------------------------------------------------------------------------------------------


def entry_of(url: str, **more: Any) -> ZooEntry:
    return ZooEntry(
        name="ours", repository="https://github.com/a/b", licence="MIT", title="MoCo v2", framework="mocov2", epochs=7,
        data="imagenet1k", arch="resnet18", url=url, **more,
    )  # fmt: skip


def test_offline_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMASK_ZOO", str(tmp_path))
    entry = known_checkpoint("swav-800ep")
    with pytest.raises(UserError, match=r"not downloaded yet: `mixmask zoo swav-800ep --fetch`"):
        locate_checkpoint("zoo:swav-800ep", download=False)
    with pytest.raises(UserError, match=r"needs a browser \(Google Drive\)"):
        locate_checkpoint("zoo:pixpro-400ep")
    place = tmp_path / "swav-800ep" / "swav_800ep_pretrain.pth.tar"
    assert zoo_path(entry) == place
    place.parent.mkdir()
    place.write_bytes(b"weights")
    assert locate_checkpoint("zoo:swav-800ep", download=False).path == place
    assert locate_checkpoint(str(place)).entry is None


@pytest.mark.slow
def test_a_run_on_a_checkpoint_of_the_zoo(
    server: tuple[str, type[Handler]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet18: Path, shapes: Path
) -> None:
    """From the address to a labelled record; a dry run downloads nothing."""
    from typer.testing import CliRunner

    from mixmask.launch.commands.app import app
    from mixmask.transfer.zoo import references

    url, handler = server
    moco = moco_checkpoint(tmp_path / "moco.pth", load_file(resnet18))
    handler.script[:] = [whole(moco.read_bytes())]
    entry = entry_of(url)
    monkeypatch.setenv("MIXMASK_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setattr(references, "known_checkpoint", lambda name: entry)
    arguments = ["transfer", "knn_photos", "backbone=zoo:ours", f"data.root={shapes}", "--runs", str(tmp_path / "runs")]
    runner = CliRunner()
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    assert handler.asked == []
    assert isinstance(dry.exception, UserError)
    assert runner.invoke(app, arguments, catch_exceptions=False).exit_code == 0
    (record,) = (tmp_path / "runs").rglob("record.json")
    found = json.loads(record.read_text())
    labels = ("framework", "method", "pretrain_epochs", "pretrain_dataset")
    assert [found[key] for key in labels] == ["mocov2", "vanilla", 7, "imagenet1k"]
    assert len(handler.asked) == 1


# --- the Hub ---------------------------------------------------------------------------------------------------------

HUB = r"""
import base64, hashlib, http.server, json, sys
models = {}
class Hub(http.server.BaseHTTPRequestHandler):
    def answer(self, code, body=b"{}", **headers):
        self.send_response(code)
        for key, value in headers.items(): self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    def do_POST(self):
        given = self.body()
        if "Bearer good" not in self.headers.get("Authorization", ""): return self.answer(401)
        if self.path == "/api/repos/create":
            asked = json.loads(given)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            models.setdefault(name, {})
            made = {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name}
            return self.answer(200, json.dumps(made).encode())
        if self.path == "/api/validate-yaml": return self.answer(200, b'{"errors": [], "warnings": []}')
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": one["path"], **plain} for one in json.loads(given)["files"]]
            return self.answer(200, json.dumps({"files": files}).encode())
        for line in given.splitlines():
            one = json.loads(line)
            if one["key"] == "file": models[name][one["value"]["path"]] = base64.b64decode(one["value"]["content"])
        done = {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
        self.answer(200, json.dumps(done).encode())
    def do_GET(self):
        parts = self.path.strip("/").split("?")[0].split("/")
        if parts[0] == "api":
            name = "/".join(parts[2:4])
            known = {"id": name, "sha": "1" * 40, "siblings": [{"rfilename": file} for file in models.get(name, {})]}
            return self.answer(200 if name in models else 404, json.dumps(known).encode())
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if name not in models: return self.answer(404, X_Error_Code="RepoNotFound")
        if file not in models[name]: return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
        content = models[name][file]
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="1" * 40)
    do_HEAD = do_GET
    def log_message(self, *arguments): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A pretended Hugging Face Hub, as the environment that leads there."""
    process = subprocess.Popen([sys.executable, "-c", HUB], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "good",
        "HF_HUB_DISABLE_XET": "1",
    }
    process.terminate()
    process.wait()


def mixmask(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mixmask", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_a_backbone_goes_to_the_hub_and_comes_back(hub: dict[str, str], tmp_path: Path, shapes: Path) -> None:
    runs = tmp_path / "runs"
    small = [
        "epochs=0",
        "backbone.arch=resnet18",
        "monitor=null",
        f"data.root={shapes}",
        "data.name=photos",
        "mix.kind=none",
    ]
    made = mixmask("pretrain", "imagenet_simclr", *small, "batch_size=4", "--runs", str(runs), environment=hub)
    assert made.returncode == 0, made.stderr
    (run,) = (runs / "pretrain").iterdir()
    dry = mixmask("push", str(run), "--to", "our-lab/r18", "--license", "mit", "--dry-run", environment=hub)
    assert "license: mit" in dry.stdout
    missing = mixmask("inspect", "hf:our-lab/r18", environment=hub)
    assert missing.returncode == 2
    assert "no such model on the Hub" in missing.stderr
    refused = mixmask("push", str(run), "--to", "our-lab/r18", environment={**hub, "HF_TOKEN": "bad"})
    assert refused.returncode == 2
    assert "you may not write there (401)" in refused.stderr
    pushed = mixmask("push", str(run), "--to", "our-lab/r18", "--license", "mit", environment=hub)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{hub['HF_ENDPOINT']}/our-lab/r18/commit/1"
    back = mixmask("inspect", "hf:our-lab/r18", environment=hub)
    assert back.returncode == 0, back.stderr
    assert "resnet18" in back.stdout
    offline = mixmask("inspect", "hf:our-lab/r18", environment={**hub, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    for wrong in ("hf:nobody", "hf:a/b/c"):
        assert mixmask("inspect", wrong, environment=hub).returncode == 2
    no_backbone = mixmask("push", str(tmp_path), "--to", "our-lab/r18", environment=hub)
    assert no_backbone.returncode == 2


def test_addresses_are_plain() -> None:
    for entry in catalogue().values():
        host = urlsplit(entry.url).hostname
        assert host is not None
        assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+", host), entry.name

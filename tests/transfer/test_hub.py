"""A backbone goes to a pretended Hugging Face Hub and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixmask.engine.errors import UserError
from mixmask.transfer.zoo.references import locate_checkpoint
from tests import zygote

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
    started = zygote.start(["-m", "mixmask", *arguments], environment)
    out, err = started.communicate(timeout=200)
    return subprocess.CompletedProcess(arguments, started.wait(), out, err)


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
    no_backbone = mixmask("push", str(tmp_path), "--to", "our-lab/r18", environment=hub)
    assert no_backbone.returncode == 2


@pytest.mark.parametrize("wrong", ["hf:nobody", "hf:a/b/c"])
def test_names_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="hf:"):
        locate_checkpoint(wrong, download=True)

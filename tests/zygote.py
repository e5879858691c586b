"""Processes that start at once: forks of one process that has already imported what takes seconds to import.

Many tests need a process of their own, to send it signals or to have two that share a run, and do not test how it starts.
`start` gives them one that is like ``python program …``, but comes in milliseconds. It has its own process id, standard
output and error, environment, folder and process group. The first call starts the process that the others are forked from.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = str(Path(__file__).resolve().parents[1])


class Started:
    """A process, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], cwd: str) -> None:
        read_out, write_out = os.pipe()
        read_err, write_err = os.pipe()
        try:
            self.pid = _zygote().fork({"argv": list(arguments), "env": dict(env), "cwd": cwd}, write_out, write_err)
        finally:
            os.close(write_out)
            os.close(write_err)
        self.args = list(arguments)
        self.stdout: IO[str] = os.fdopen(read_out, encoding="utf-8", errors="replace")
        self.stderr: IO[str] = os.fdopen(read_err, encoding="utf-8", errors="replace")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _zygote().ended.get(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        with _zygote().changed:
            while (code := self.poll()) is None:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    assert timeout is not None
                    raise subprocess.TimeoutExpired(self.args, timeout)
                _zygote().changed.wait(left)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        texts = ["", ""]

        def read(number: int, stream: IO[str]) -> None:
            texts[number] = stream.read()

        readers = [threading.Thread(target=read, args=pair) for pair in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.daemon = True
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: Sequence[str], env: Mapping[str, str] | None = None, cwd: str = ROOT) -> Started:
    """Like ``subprocess.Popen([sys.executable, *arguments], …)`` with pipes for its output.

    Args:
        arguments: ``-m module …``, ``-c code …`` or ``script.py …``.
        env: The environment; this process's by default.
        cwd: Its folder.
    """
    return Started(arguments, os.environ if env is None else env, cwd)


def run(arguments: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` with captured output."""
    process = start(arguments)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# --- this side -------------------------------------------------------------------------------------------------------


class _Zygote:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(theirs.fileno())], env=env, cwd=ROOT, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.socket = ours
        self.changed = threading.Condition()
        self.forked: list[int] = []
        self.ended: dict[int, int] = {}
        self.gone = False
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.process.kill)

    def fork(self, request: dict[str, Any], *outputs: int) -> int:
        with self.changed:
            socket.send_fds(self.socket, [json.dumps(request).encode()], outputs)
            self.changed.wait_for(lambda: self.forked or self.gone, 120)
            if not self.forked:
                raise RuntimeError("the process that tests are forked from has ended or does not answer")
            return self.forked.pop()

    def _listen(self) -> None:
        while True:
            try:
                message = self.socket.recv(1 << 16)
            except ConnectionError:
                message = b""
            if not message:
                with self.changed:
                    self.gone = True
                    self.changed.notify_all()
                return
            kind, pid, code = json.loads(message)
            with self.changed:
                if kind == "forked":
                    self.forked.append(pid)
                else:
                    self.ended[pid] = code
                self.changed.notify_all()


_made: list[_Zygote] = []


def _zygote() -> _Zygote:
    if not _made:
        _made.append(_Zygote())
    return _made[0]


# --- the other side --------------------------------------------------------------------------------------------------


def _serve(channel: socket.socket) -> None:
    import matplotlib.figure  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401

    import mixmask.evaluate.report
    import mixmask.launch.commands.app
    import mixmask.launch.slurm.jobs
    import mixmask.pretrain.stage
    import mixmask.transfer.stage  # noqa: F401

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([channel, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                channel.send(json.dumps(["ended", pid, os.waitstatus_to_exitcode(status)]).encode())
        if channel in ready:
            message, files, _, _ = socket.recv_fds(channel, 1 << 20, 2)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                os.setsid()  # a group of its own, which a test may signal as a whole
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for one in (channel.fileno(), woken, wake):
                    os.close(one)
                _become(json.loads(message), *files)
            for file in files:
                os.close(file)
            channel.send(json.dumps(["forked", pid, 0]).encode())


def _become(request: dict[str, Any], out: int, err: int) -> None:
    """Turn this fork into the process that was asked for; never returns."""
    import torch

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    sys.stdout = open(1, "w", encoding="utf-8", buffering=8192, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    first, *rest = request["argv"]
    code = 0
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        try:
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))

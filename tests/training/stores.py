"""A real S3 server (moto) or GCS server (gcp-storage-emulator) on loopback that stands for a bucket; not part of `dev`.

pip install 'moto[server]==5.2.5' gcp-storage-emulator==2026.7.19
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

PROGRAMS = {
    "s3": ("moto", "from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"),
    "gs": (
        "gcp_storage_emulator",
        "from gcp_storage_emulator.__main__ import main; "
        "main(['start', '--host=127.0.0.1', '--port={port}', '--in-memory', '--default-bucket=bucket'])",
    ),
    "throttled s3": (
        "moto",
        "import runpy, sys; sys.argv[1:] = ['{port}']; "
        "runpy.run_module('tests.training.throttled_s3', run_name='__main__')",
    ),
}


class Store:
    """One server. `environment` leads a process to it; `url` is a prefix in its bucket, which it holds in memory."""

    def __init__(self, scheme: str):
        module, self._program = PROGRAMS[scheme]
        scheme = scheme.split()[-1]
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: see tests/training/stores.py")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.scheme, self.url, self.address = scheme, f"{scheme}://bucket/runs", f"http://127.0.0.1:{self.port}"
        keys = dict(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="y")
        self.environment = {
            "s3": keys | dict(AWS_ENDPOINT_URL=self.address),
            "gs": dict(STORAGE_EMULATOR_HOST=self.address),
        }[scheme]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", self._program.format(port=self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                break
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.05)
        if self.scheme == "s3":
            urllib.request.urlopen(urllib.request.Request(f"{self.address}/bucket", method="PUT")).read()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def store(scheme: str) -> Iterator[Store]:
    """A server, one of PROGRAMS, that this process and those it starts are led to."""
    opened = Store(scheme)
    before = dict(os.environ)
    os.environ.update(opened.environment)
    try:
        yield opened
    finally:
        os.environ.clear()
        os.environ.update(before)
        opened.stop()

"""The tool host as a child process: start, wait until healthy, restart on the same port, stop."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tools_env.errors import ToolHostError
from tools_env.service.settings import TOKEN_VARIABLE, HostSettings

_ROOT = Path(__file__).resolve().parent.parent


class ToolHost:
    """Runs `python -m tools_env.server`; a context manager. The child process also stops when this process ends."""

    def __init__(
        self,
        offline_web: str | os.PathLike,
        *,
        log_path: str | os.PathLike | None = None,
        startup_timeout: float = 120.0,
        **settings,
    ):
        """Starts nothing yet.

        Args:
          offline_web: as in HostSettings, like all of `settings`.
          log_path: the host's log, appended to; default: a temporary file.
          startup_timeout: seconds until the host must answer, including the time to build the index.
        """
        self._settings = HostSettings(offline_web=str(offline_web), **settings)
        self._log_path = Path(log_path) if log_path else Path(tempfile.mkdtemp(prefix="stepdr_host_")) / "tool_host.log"
        self._startup_timeout = startup_timeout
        self._process: subprocess.Popen | None = None
        self._address: str | None = None

    def __enter__(self) -> "ToolHost":
        self.start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """host:port; stays the same over restarts. Raises ToolHostError before the first start."""
        if self._address is None:
            raise ToolHostError("the tool host has not been started")
        return self._address

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def log_path(self) -> Path:
        return self._log_path

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Starts the host and returns its address. Raises ToolHostError with the last line of its log."""
        if self.alive():
            return self.address
        self.stop()
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="stepdr_host_") as folder:
            port_file = Path(folder) / "address"
            command = server_command(self._settings, port_file)
            environment = server_environment(self._settings)
            with open(self._log_path, "ab") as log:
                log_start = log.tell()
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, env=environment
                )
            try:
                self._address = self._wait(port_file, log_start)
            except BaseException:
                self.stop()
                raise
        # A restart must use the same port.
        self._settings = dataclasses.replace(self._settings, port=int(self._address.rsplit(":", 1)[1]))
        return self._address

    def _wait(self, port_file: Path, log_start: int) -> str:
        end = time.monotonic() + self._startup_timeout
        while time.monotonic() < end:
            if port_file.exists():
                address = port_file.read_text().strip()
                if _serving(address, max(end - time.monotonic(), 0.1)):
                    return address
            if not self.alive():
                raise ToolHostError(f"the tool host did not start: {self._last_words(log_start)}")
            time.sleep(0.02)
        raise ToolHostError(f"the tool host did not answer within {self._startup_timeout:g} s; see {self._log_path}")

    def _last_words(self, log_start: int) -> str:
        with open(self._log_path, "rb") as log:
            log.seek(log_start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        told = [line.removeprefix("tool host: ") for line in lines if line.startswith("tool host: ")]
        return told[-1] if told else f"{lines[-1] if lines else 'it said nothing'} (log: {self._log_path})"

    def restart(self) -> str:
        """Restarts the host on the same port; open sessions are lost without a state_dir. Returns the address."""
        self.stop()
        return self.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Drains and ends the host; after `timeout` seconds it is killed. Does nothing when it is not running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._process = None


def _serving(address: str, timeout: float) -> bool:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            reply = check(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
        except grpc.RpcError:
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING


def server_command(settings: HostSettings, port_file: Path) -> list[str]:
    """Returns the command line of a host with these settings, except the token, which is passed in the environment."""
    command = [sys.executable, "-m", "tools_env.server", f"--port_file={port_file}", "--stop_with_stdin"]
    for field in dataclasses.fields(HostSettings):
        value = getattr(settings, field.name)
        if field.name != "token" and value != field.default:
            command.append(f"--{field.name}" if field.type is bool else f"--{field.name}={value}")
    return command


def server_environment(settings: HostSettings) -> dict[str, str]:
    """Returns the environment of that command: this process's, plus the token and the path of this package."""
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    pythonpath = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": pythonpath, TOKEN_VARIABLE: settings.token or ""}

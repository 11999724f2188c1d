"""Serves the research tools over gRPC until stopped: search, pages, files, todo lists.

Prints host:port when it answers calls. Sizes and timeouts are the config's `tools` section; a bearer token is read from
$STEPDR_TOOLS_TOKEN. On a host without this package's training side, `python -m tools_env.server` does the same.
"""

import logging
import os

from absl import flags

from launch import entry
from stepdr_jax.runtime.layout import RunLayout
from tools_env import server
from tools_env.service.settings import TOKEN_VARIABLE, HostSettings

OFFLINE_WEB = flags.DEFINE_string("offline_web", "", "offline web's directory; empty: run_dir/world, built if needed")
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
PORT = flags.DEFINE_integer("port", 0, "port to listen on; 0: any free one")
PORT_FILE = flags.DEFINE_string("port_file", "", "file written with host:port when the host answers calls")
STATE = flags.DEFINE_string("state", "", "directory of the retrieval cache and the sessions; empty: in memory and /tmp")
WEB_PORT = flags.DEFINE_integer("web_port", 0, "loopback port of a running offline web server; 0: start one")
WORKERS = flags.DEFINE_integer("workers", 1, "processes behind the port; one that dies is restarted with its sessions")
METRICS_PORT = flags.DEFINE_integer("metrics_port", -1, "port of Prometheus metrics; 0: any free one; -1: none")
ALLOW_INTERNET = flags.DEFINE_boolean("allow_internet", False, "allow public addresses outside the offline web")


def main(config) -> None:
    offline_web = OFFLINE_WEB.value
    if not offline_web:
        from tools_env.offline_web.build import build_offline_web

        offline_web = str(RunLayout.from_config(config).offline_web)
        build_offline_web(offline_web, seed=config.data_seed, documents=config.offline_web.documents)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = HostSettings(
        offline_web=offline_web,
        host=HOST.value,
        port=PORT.value,
        token=os.environ.get(TOKEN_VARIABLE) or None,
        state_dir=STATE.value or None,
        web_port=WEB_PORT.value or None,
        workers=WORKERS.value,
        metrics_port=None if METRICS_PORT.value < 0 else METRICS_PORT.value,
        allow_internet=ALLOW_INTERNET.value,
        topk=config.tools.topk,
        max_observation_chars=config.tools.max_observation_chars,
        fetch_timeout=config.tools.fetch_timeout,
        concurrency=config.tools.concurrency,
    )
    server.run_host(settings, port_file=PORT_FILE.value or None)


if __name__ == "__main__":
    entry.run(main, __doc__)

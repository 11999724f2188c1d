"""launch/gke/tools: the host takes the flags of the manifests, and the parts name each other correctly."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools_env import server
from tools_env.search import choose
from tools_env.service import health

yaml = pytest.importorskip("yaml")
FOLDER = Path(__file__).resolve().parents[2] / "launch" / "gke" / "tools"
DOCUMENTS = [document for file in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(file.read_text())]


def of(kind: str, name: str) -> dict:
    return next(d for d in DOCUMENTS if d["kind"] == kind and d["metadata"]["name"] == name)


def pod(kind: str, name: str) -> dict:
    return of(kind, name)["spec"]["template"]["spec"]


def given(monkeypatch) -> object:
    container = pod("StatefulSet", "tools")["containers"][0]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], "given")
    settings, _ = server.parse_flags([flag.replace("$(POD)", "tools-0") for flag in container["args"]])
    return settings


def test_host_takes_the_flags_of_the_manifest(monkeypatch):
    settings = given(monkeypatch)
    assert settings.token == "given" and settings.workers > 1 and settings.tls_cert and settings.otlp_endpoint
    assert choose.read_search_options(settings.search, settings.search_options)["index"]
    drain = pod("StatefulSet", "tools")["terminationGracePeriodSeconds"]
    assert settings.drain < drain


def test_names_ports_mounts_and_secrets_fit_together(monkeypatch):
    settings = given(monkeypatch)
    services = {
        d["metadata"]["name"]: {p["port"] for p in d["spec"]["ports"]} for d in DOCUMENTS if d["kind"] == "Service"
    }
    addresses = [settings.redis_url, settings.search_options, settings.advertise]
    for text in addresses:
        name, port = re.search(r"(?:tools-0\.)?([\w-]+)\.stepdr-tools\.svc:(\d+)", text).groups()
        assert int(port) in services[name]
    assert of("StatefulSet", "tools")["spec"]["serviceName"] == settings.advertise.split(".")[1]
    spec = pod("StatefulSet", "tools")
    container = spec["containers"][0]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    for path in (settings.offline_web, settings.state_dir, "/tls", "/tmp"):
        assert path in mounts
    claimed = {t["metadata"]["name"] for t in of("StatefulSet", "tools")["spec"]["volumeClaimTemplates"]}
    assert {mount["name"] for mount in mounts.values()} == {v["name"] for v in spec["volumes"]} | claimed
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = container[kind]["exec"]["command"]
        assert command[1:3] == ["-m", health.__name__] and f"127.0.0.1:{settings.port}" in command[3]


def test_nothing_runs_as_root_or_may_ask_the_cluster():
    pods = [d["spec"]["template"]["spec"] for d in DOCUMENTS if d["kind"] in ("StatefulSet", "Deployment")]
    assert len(pods) == 3
    for spec in pods:
        assert spec["automountServiceAccountToken"] is False and spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
    lines = (FOLDER / "Containerfile").read_text().splitlines()
    assert lines.index("USER 10001") > max(i for i, line in enumerate(lines) if line.startswith("RUN"))


def test_every_pod_is_named_by_a_policy():
    policies = [d["spec"]["podSelector"] for d in DOCUMENTS if d["kind"] == "NetworkPolicy"]
    assert {} in policies  # nothing unless said
    named = {policy["matchLabels"]["app"] for policy in policies if "matchLabels" in policy}
    named |= {value for policy in policies for rule in policy.get("matchExpressions", ()) for value in rule["values"]}
    assert named == {"tools", "redis", "opensearch"}


def test_manifests_fit_the_schemas_of_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in DOCUMENTS:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_health_command_says_whether_a_host_answers(running, tmp_path):
    import asyncio

    async def main():
        async with running() as it:
            command = [sys.executable, "-m", "tools_env.service.health", f"--address={it.address}"]
            return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)

    done = asyncio.run(main())
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
    assert health.main(["--address=127.0.0.1:1", "--timeout=0.5"]) == 1
    assert health.main(["--address=127.0.0.1:1", f"--tls_ca={tmp_path / 'none'}"]) == 2

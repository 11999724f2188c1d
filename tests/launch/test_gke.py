"""The trainer's manifests ask for the hosts that the config's mesh needs; their arguments are the launcher's."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ml_collections import ConfigDict

from stepdr_jax.runtime import distributed
from stepdr_jax.sharding import topology

GKE = Path(__file__).parents[2] / "launch" / "gke"


# In a process of its own: scripts define flags, and two of them must not meet.
PARSE = """
import importlib, sys
from launch import entry
importlib.import_module(sys.argv[1])
print(entry.parse(sys.argv[1:]).to_json_best_effort())
"""


@pytest.mark.parametrize("path", sorted(GKE.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_manifest_fits_the_launcher_and_the_mesh(path):
    [jobset] = yaml.safe_load_all(path.read_text())
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    command = [sys.executable, "-c", PARSE, *container["args"]]
    parsed = subprocess.run(command, cwd=GKE.parents[1], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    config = ConfigDict(json.loads(parsed.stdout))

    accelerator = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"].split("-")[1]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    slices = topology.parse(f"{accelerator}:{shape}", job["replicas"])
    per_host = int(container["resources"]["limits"]["google.com/tpu"])
    chips = math.prod(map(int, shape.split("x")))
    assert slices.chips == chips * job["replicas"]
    assert spec["parallelism"] == spec["completions"] == chips // per_host
    topology.check_mesh(slices, dict(config.mesh))
    assert math.prod(dict(config.mesh).values()) == chips * job["replicas"]
    for stage in ("midtrain1", "midtrain2"):
        assert config[stage].batch_size % (config.mesh.data * config.mesh.fsdp * config[stage].microbatches) == 0
    assert config.distributed.coordinator == "auto"
    assert config.run_dir.startswith(container["volumeMounts"][0]["mountPath"])

    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    [rule] = spec["podFailurePolicy"]["rules"]
    assert distributed.RESTART not in rule["onExitCodes"]["values"] and 2 in rule["onExitCodes"]["values"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_the_image_holds_what_a_launcher_needs():
    lines = (GKE / "Containerfile").read_text().splitlines()
    copied = {line.split()[1] for line in lines if line.startswith("COPY") and line.count(" ") == 2}
    assert copied == {"stepdr_jax", "tools_env", "launch", "configs"}
    lock = (GKE.parents[1] / "launch" / "environment.sh").read_text()
    version = re.search(r"^LIBTPU_VERSION=(\S+)", lock, re.MULTILINE)[1]
    assert f"libtpu=={version}" in "".join(lines)

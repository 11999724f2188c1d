"""PPO's manifest: its sampler fits a host, and the tools it calls are those of the tool hosts' manifests."""

import math
from pathlib import Path

import yaml

from launch import entry

GKE = Path(__file__).parents[2] / "launch" / "gke"


def parts():
    [jobset] = yaml.safe_load_all((GKE / "ppo.yaml").read_text())
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = template["template"]["spec"]["containers"]
    flags = dict(word.split("=", 1) for word in container["args"] if "=" in word)
    return template, container, flags


def test_a_replica_of_the_sampler_is_a_host_and_episodes_are_shared_out_evenly():
    template, container, flags = parts()
    config = entry.load(GKE.parents[1] / flags["--config"])
    assert config.sampler.replicas * config.sampler.tensor == int(container["resources"]["limits"]["google.com/tpu"])
    assert math.prod(config.mesh.values()) == template["parallelism"] * config.sampler.tensor
    assert config.ppo.prompts_per_iteration * config.ppo.samples_per_prompt % template["parallelism"] == 0


def test_it_calls_the_tool_hosts_service_with_their_token_and_authority():
    template, container, flags = parts()
    tools = list(yaml.safe_load_all((GKE / "tools" / "tools.yaml").read_text()))
    [service] = [d for d in tools if d["kind"] == "Service" and d["spec"].get("clusterIP") != "None"]
    name, space, port = (
        service["metadata"]["name"],
        service["metadata"]["namespace"],
        service["spec"]["ports"][0]["port"],
    )
    assert flags["--config.tools.address"] == f"dns:///{name}.{space}.svc:{port}"
    config = entry.load(GKE.parents[1] / flags["--config"])
    environment = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"]}
    [host] = [d for d in tools if d["kind"] == "StatefulSet"]
    theirs = {entry["name"]: entry["valueFrom"] for entry in host["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment[config.tools.token_env] == theirs["STEPDR_TOOLS_TOKEN"]["secretKeyRef"]
    assert config.judge.api_key_env in environment
    assert Path(flags["--config.tools.tls_ca"]).parent in [Path(v["mountPath"]) for v in container["volumeMounts"]]
    policies = (GKE / "tools" / "policies.yaml").read_text()
    [label] = template["template"]["metadata"]["labels"].items()
    assert f'{label[0]}: "{label[1]}"' in policies

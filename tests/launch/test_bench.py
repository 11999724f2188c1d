import json
import os
import subprocess
import sys
from importlib import metadata

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}  # else it starts itself again
    command = [sys.executable, "-m", "launch.bench", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_peer_that_is_absent_is_named_with_its_recipe():
    try:
        metadata.version("google-tunix")
    except metadata.PackageNotFoundError:
        pass
    else:
        pytest.skip("Tunix is installed")
    done = run("ppo")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install google-tunix==0.1.7")
    assert len(done.stderr.strip().splitlines()) == 1


def test_decode_measures_against_the_memory_it_is_told():
    sizes = ["decode", "--max_num_seqs=2", "--seq_len=40", "--rounds=1"]
    done = run(*sizes, "--bandwidth=1e10")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # float32: two layers, keys and values of two heads of 32; on average 40 + 16 tokens of two sequences
    assert found["bytes_a_step"]["kv"] == 4 * 2 * 2 * 2 * 32 * 56 * 2
    assert 0 < found["roofline_share"] and found["tokens_per_second"] > 0
    unknown = run(*sizes)
    assert unknown.returncode == 2 and "--bandwidth" in unknown.stderr

"""The sampler's decode step on a TPU runs the paged kernel and keeps one pool of pages, not two."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepdr_jax.aot.compile import ENVIRONMENT


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e .[tpu]")
def test_a_decode_steps_pages_are_updated_in_place():
    script = Path(__file__).with_name("decode_step.py")
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["attention"] == "ragged"
    assert memory["aliased"] >= memory["pool"]
    assert memory["temporaries"] < memory["pool"] / 10

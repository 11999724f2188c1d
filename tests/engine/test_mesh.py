"""A sampler split over a mesh samples what one device does."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_mesh_of_data_and_tensor_samples_the_same():
    script = Path(__file__).with_name("on_a_mesh.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same_ids"] and found["turns"] == 36 and found["devices"] == 4
    assert found["largest_difference"] < 1e-3  # sharp logits: sums in another order

"""Documents are read by processes with limits of their own, whatever the parser in them does."""

import json
import subprocess
import sys
import time

import pytest

HEAD = "import sys; import {module} as m; m.{parse} = {attack}; m.{seconds} = 1; sys.argv = ['x', 'a.pdf']; m.main()"
READERS = {
    "tools_env.web.page": dict(parse="_parse_pdf", seconds="_PDF_SECONDS"),
    "tools_env.tools.documents": dict(parse="read_document", seconds="CPU_SECONDS"),
}
ATTACKS = {
    "memory": "lambda *a: bytearray(3 << 30)",
    "processor": "lambda *a: [None for _ in iter(int, 1)]",
    "files": "lambda *a: open({path!r}, 'wb', 0).write(b'x' * 10)",
}


@pytest.mark.parametrize("module", READERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_parser_that_takes_too_much_is_ended(module, attack, tmp_path):
    path = tmp_path / "written"
    script = HEAD.format(module=module, attack=ATTACKS[attack].format(path=str(path)), **READERS[module])
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], input=b"", capture_output=True, timeout=60)
    if attack == "processor":  # killed by the kernel; the host says so for it
        assert done.returncode < 0 and not done.stdout and time.monotonic() - began < 50
        return
    error = json.loads(done.stdout)["error"]
    if attack == "memory":
        assert "MemoryError" in error or "too large" in error
    else:
        assert "OSError" in error and path.stat().st_size == 0

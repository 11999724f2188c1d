"""Facts about atomic files."""

import pytest

from stepdr_jax import files
from stepdr_jax.errors import UserError


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder .*file/run .*choose another run_dir"):
        files.write_json(tmp_path / "file" / "run" / "x.json", {})

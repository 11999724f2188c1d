"""Weights on their way to a vLLM or SGLang server: Hugging Face folders that the server reads, one for each version."""

import os
import re
import secrets
import shutil
from pathlib import Path

from stepdr_jax import files
from stepdr_jax.models import hf
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime import distributed

_NAME = re.compile(r"\.?\d{8}-[0-9a-f]{8}")  # with the dot: being written


class WeightsFolder:
    """Writes every version to a subfolder of `directory`, which is whole when it has its name, and deletes old ones.

    The name of a subfolder ends with a number drawn for this object, so it names these weights among those of all runs:
    servers state it as the version of their weights. Every process must make the object and call its methods.

    Args:
        directory: where the servers see the same files under the same path.
        model: shape of the model.
        dtype: of the weights in the files, float32 or bfloat16.
    """

    def __init__(self, directory: Path, model: Qwen2Config, dtype: str):
        self.directory, self.model, self.dtype = directory.absolute(), model, dtype
        self._mark = distributed.gather_bytes(secrets.token_hex(4).encode())[0].decode()  # the lead's

    def publish(self, params: dict, version: int) -> str:
        """Writes `params` (tree of `qwen2.param_shapes`) and returns the path of the subfolder."""
        path = self.directory / f"{version:08d}-{self._mark}"
        hidden = path.with_name(f".{path.name}")
        if distributed.is_lead():
            for old in (path, hidden):
                shutil.rmtree(old, ignore_errors=True)
        hf.save(self.model, params, hidden, dtype=self.dtype)
        if distributed.is_lead():
            os.rename(hidden, path)
            files.sync_directory(self.directory)
        distributed.barrier(f"weights {path.name}")
        return str(path)

    def keep_only(self, path: str) -> None:
        """Deletes all other versions, those of earlier runs, too."""
        if distributed.is_lead():
            for old in self.directory.iterdir():
                if _NAME.fullmatch(old.name) and str(old) != path:
                    shutil.rmtree(old, ignore_errors=True)

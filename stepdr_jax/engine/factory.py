"""The sampler that a config describes: the JAX engine on this process's devices, or vLLM or SGLang servers."""

import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from stepdr_jax.endpoint import Endpoint
from stepdr_jax.engine import weights
from stepdr_jax.engine.engine import JaxEngine
from stepdr_jax.engine.publish import WeightsFolder
from stepdr_jax.engine.remote import RemoteEngine
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.tokens.tokenizer import Tokenizer


def make_engine(
    config,
    params: dict,
    model: Qwen2Config,
    tokenizer: Tokenizer,
    *,
    version: int = 0,
    devices: Sequence[jax.Device] | None = None,
    weight_sync_bytes: int = weights.BUCKET_BYTES,
) -> JaxEngine | RemoteEngine:
    """The engine of `config.sampler`, stopping at the end of a turn.

    Args:
        config: the run's config.
        params: tree of `qwen2.param_shapes(model)`, wherever it is.
        model: its shape.
        tokenizer: whose control tokens end a turn.
        version: of the weights.
        devices: replicas * tensor of this process; default the first ones. Servers have their own.
        weight_sync_bytes: of `JaxEngine`.

    Raises:
        UserError: sizes that do not fit each other or the devices; a server does not answer.
    """
    section = config.sampler
    stop_ids = (tokenizer.im_end, tokenizer.endoftext)
    if section.engine != "jax":
        for url in section.urls:
            _require_server(url)
        directory = Path(section.weights_dir or RunLayout.from_config(config).published_weights)
        folder = WeightsFolder(directory, model, section.weights_dtype)
        # Retried for up to twice the timeout: a server that was killed needs that to come back.
        settings = dict(timeout=section.timeout, retries=20, concurrency=section.max_num_seqs)
        return RemoteEngine(
            [Endpoint(url, **settings) for url in section.urls],
            section.engine,
            model=section.model,
            max_len=config.agent.max_episode_tokens,
            stop_ids=stop_ids,
            version=version,
            published=folder.publish(params, version),
            folder=folder,
        )
    wanted = section.replicas * section.tensor
    devices = list(jax.local_devices()[:wanted] if devices is None else devices)
    if wanted > len(devices):
        raise UserError(f"sampler.replicas * sampler.tensor: expected at most the {len(devices)} devices, got {wanted}")
    mesh = Mesh(np.array(devices).reshape(section.replicas, section.tensor), ("data", "tensor"))
    try:
        return JaxEngine(
            params,
            model,
            max_num_seqs=section.max_num_seqs,
            pools=section.pools,
            page_size=section.page_size,
            num_pages=section.num_pages,
            prefill_batch=section.prefill_batch,
            prefill_chunk=section.prefill_chunk,
            decode_steps=section.decode_steps,
            prefill_calls=section.prefill_calls,
            host_bytes=int(section.host_gb * 2**30),
            attention=section.attention,
            max_len=config.agent.max_episode_tokens,
            stop_ids=stop_ids,
            version=version,
            weight_sync_bytes=weight_sync_bytes,
            mesh=mesh,
        )
    except ValueError as error:
        raise UserError(f"sampler: {error}; change the config's sampler or placement section") from None


def _require_server(url: str) -> None:
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/health", timeout=30):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        raise UserError(f"sampler.urls: {url} does not answer ({error}); start the server first") from None


def with_max_num_seqs(config, count: int):
    """A copy of the config whose sampler decodes `count` sequences together, in one pool."""
    other = config.copy_and_resolve_references().unlock()
    other.sampler.update(dict(max_num_seqs=count, pools=1, num_pages=0))
    return other.lock()

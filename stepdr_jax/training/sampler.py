"""The sampling engine that a config describes (config.sampler)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stepdr_jax.engine import weights
from stepdr_jax.engine.engine import JaxEngine
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime.compilation import enable_compilation_cache
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import state


def make_engine(
    config: ConfigDict,
    params: dict[str, Any],
    model: Qwen2Config,
    tokenizer: Tokenizer,
    *,
    version: int = 0,
    devices: Sequence[jax.Device] | None = None,
    transfer_bytes: int = weights.LIMIT,
) -> JaxEngine:
    """The engine of `config.sampler`; a sequence stops at the end of a turn.

    Args:
        config: the run's config.
        params: tree of `qwen2.param_shapes(model)`, on any devices.
        model: shape of the model.
        tokenizer: whose control tokens end a turn.
        version: of the weights.
        devices: replicas * tensor devices of this process; default the first ones.
        transfer_bytes: of `JaxEngine`.

    Raises:
        UserError: sizes that do not fit each other or the devices.
    """
    section = config.sampler
    wanted = section.replicas * section.tensor
    devices = list(jax.local_devices()[:wanted] if devices is None else devices)
    if wanted > len(devices):
        raise UserError(f"sampler.replicas * sampler.tensor: expected at most the {len(devices)} devices, got {wanted}")
    mesh = Mesh(np.array(devices).reshape(section.replicas, section.tensor), ("data", "tensor"))
    try:
        return JaxEngine(
            params,
            model,
            slots=section.max_num_seqs,
            shards=section.pools,
            page=section.page_size,
            pages=section.num_pages,
            rows=section.prefill_batch,
            chunk=section.prefill_chunk,
            steps=section.decode_steps,
            prefill_calls=section.prefill_calls,
            host_bytes=int(section.host_gb * 2**30),
            attention=section.attention,
            max_len=config.agent.max_episode_tokens,
            stop_ids=(tokenizer.im_end, tokenizer.endoftext),
            version=version,
            transfer_bytes=transfer_bytes,
            mesh=mesh,
        )
    except ValueError as error:
        raise UserError(f"sampler: {error}; change the sampler or placement section of the config") from None


def load_stage_engine(config: ConfigDict, stage: str) -> tuple[JaxEngine, Tokenizer]:
    """The engine with the weights of a finished stage of a run directory, and the tokenizer.

    Raises:
        UserError: the stage has not finished, or its checkpoints are damaged.
    """
    layout = RunLayout.from_config(config)
    tokenizer = Tokenizer.load(layout.tokenizer)
    enable_compilation_cache(layout.compilation_cache)
    params = state.load_params(config, config.seed, stage)
    model = Qwen2Config.from_config(config.model, state.vocab_size(config))
    return make_engine(config, params, model, tokenizer), tokenizer


def with_max_num_seqs(config: ConfigDict, max_num_seqs: int) -> ConfigDict:
    """A copy of the config whose sampler runs `max_num_seqs` sequences at a time in one pool."""
    other = config.copy_and_resolve_references().unlock()
    other.sampler.update(dict(max_num_seqs=max_num_seqs, pools=1, num_pages=0))
    return other.lock()

"""The sampler as the config describes it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from stepdr_jax.engine import weights
from stepdr_jax.engine.engine import JaxEngine
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime.compilation import keep_compiled
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import state


def engine_of(
    config,
    params: dict,
    model: Qwen2Config,
    tokenizer: Tokenizer,
    *,
    version: int = 0,
    devices: Sequence[jax.Device] | None = None,
    transfer_bytes: int = weights.LIMIT,
) -> JaxEngine:
    """The engine of `config.sampler`, stopping at the end of a turn.

    Args:
        config: the run's config.
        params: tree of `qwen2.param_shapes(model)`, wherever it is.
        model: its shape.
        tokenizer: whose control tokens end a turn.
        version: of the weights.
        devices: replicas * tensor of this process; default the first ones.
        transfer_bytes: of `JaxEngine`.

    Raises UserError for sizes that do not fit each other or the devices.
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
        raise UserError(f"sampler: {error}; change the config's sampler or roles section") from None


def of_stage(config, stage: str) -> tuple[JaxEngine, Tokenizer]:
    """The engine with the weights of a finished stage of a run directory, and the tokenizer.

    Raises UserError when the stage has not finished or its checkpoints are damaged.
    """
    layout = RunLayout.from_config(config)
    tokenizer = Tokenizer.load(layout.tokenizer)
    keep_compiled(layout.compilation_cache)
    params = state.load_params(config, config.seed, stage)
    model = Qwen2Config.from_config(config.model, state.vocab_size(config))
    return engine_of(config, params, model, tokenizer), tokenizer


def with_slots(config, slots: int):
    """A copy of the config whose sampler has so many slots in one shard."""
    other = config.copy_and_resolve_references().unlock()
    other.sampler.update(dict(max_num_seqs=slots, pools=1, num_pages=0))
    return other.lock()

"""The critic: a Qwen2.5 decoder with one linear head that reads a value at every token.

The tree is {"decoder": a qwen2 tree without an unembedding of its own, "value_kernel": [D], "value_bias": []}.

Shape suffixes: B sequences, T tokens (of queries), D model width.
"""

import jax
import jax.numpy as jnp

from stepdr_jax.models import qwen2
from stepdr_jax.sharding.placement import WHOLE, Placement


def init_value_params(actor_params: dict, config: qwen2.Qwen2Config, key: jax.Array) -> dict:
    """Critic parameters: the decoder starts as a copy of the actor's, the head at zero, so first values are 0.

    Args:
        actor_params: tree of `qwen2.param_shapes(config)`; not aliased.
        config: model shape.
        key: accepted so that heads with random starts can replace this one; the zero head does not use it.
    """
    del key
    decoder = {name: leaf for name, leaf in actor_params.items() if name != "unembedding"}
    return {
        "decoder": jax.tree.map(jnp.copy, decoder),
        "value_kernel": jnp.zeros((config.hidden_size,), jnp.float32),
        "value_bias": jnp.zeros((), jnp.float32),
    }


def values(
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    config: qwen2.Qwen2Config,
    *,
    placement: Placement = WHOLE,
    remat: str = "none",
) -> jax.Array:
    """v_BT float32: the value after reading tokens 0..t of the segment; `placement` and `remat` as in
    `hidden_states`."""
    x_BTD = qwen2.hidden_states(
        params["decoder"], tokens_BT, positions_BT, segment_ids_BT, config, placement=placement, remat=remat
    )
    return jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), params["value_kernel"]) + params["value_bias"]

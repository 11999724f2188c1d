"""The rows of docs/plans.md: Qwen2.5-32B on the slices that one would rent for it."""

from pathlib import Path

from ml_collections import ConfigDict

from stepdr_jax.aot import plan as planning
from stepdr_jax.aot import ppo_plan
from stepdr_jax.progress import Progress
from stepdr_jax.sharding import topology

CONTEXT = 131072
# slice, (data, fsdp, context, tensor), seq_len, batch_size
ROWS = (
    ("v5p:2x2x2", (1, 1, 8, 1), CONTEXT, 1),
    ("v5p:4x4x8", (1, 8, 16, 1), CONTEXT, 8),
    ("v5p:8x8x8", (1, 8, 64, 1), CONTEXT, 8),
    ("v5p:8x8x8", (1, 8, 64, 1), 8 * CONTEXT, 8),
    ("2xv5p:8x8x8", (2, 8, 64, 1), CONTEXT, 16),
    ("v5e:8x8", (1, 2, 32, 1), CONTEXT, 2),
    ("v5e:16x16", (1, 8, 32, 1), CONTEXT, 8),
    ("v5e:4x8", (1, 1, 32, 1), CONTEXT, 1),
    ("v6e:4x8", (1, 1, 32, 1), CONTEXT, 1),
    ("v6e:8x8", (1, 4, 16, 1), CONTEXT, 4),
    ("v6e:16x16", (1, 16, 16, 1), CONTEXT, 16),
    ("v6e:4x4", (1, 1, 16, 1), CONTEXT, 1),
    ("tpu7x:4x4x4", (1, 8, 16, 1), CONTEXT, 8),
)


def config_of(name: str, mesh: tuple[int, ...], seq_len: int, batch_size: int) -> ConfigDict:
    """configs/midtrain_128k.py for another slice: its mesh, batch size and vocabulary tiles, and all_gather on v5e,
    where permutes are synchronous."""
    from configs import midtrain_128k

    data, fsdp, shards, tensor = mesh
    config = planning.changed(
        midtrain_128k.get_config(),
        "midtrain2",
        mesh=dict(data=data, fsdp=fsdp, context=shards, tensor=tensor),
        seq_len=seq_len,
        batch_size=batch_size,
    )
    strategy = "all_gather" if name.startswith("v5e") else "ring"
    tiles = planning.tiles_of(config)
    return planning.changed(config, "midtrain2", parallel=dict(context_strategy=strategy, vocab_tiles=tiles))


def make_table(settings: planning.Settings) -> list[dict]:
    """A plan of the train step for each row, code left out (see compile.compile_program)."""
    progress, plans = Progress("table of plans", len(ROWS), "rows"), []
    quick = planning.Settings(quick=True, limit=settings.limit, cache=settings.cache and Path(settings.cache))
    for name, mesh, seq_len, batch_size in ROWS:
        config = config_of(name, mesh, seq_len, batch_size)
        plans.append(planning.plan(config, "midtrain2", topology.parse(name), ["train"], quick))
        progress.update(slice=name)
    return plans


def make_ppo(settings: planning.Settings, tokens: int = 0, sampled: int = 0) -> list[dict]:
    """Plans of PPO, code left out: on 128 and on 256 chips of v5p, the sampler colocated and disaggregated, each with
    both offloads.

    Args:
        settings: limit and cache.
        tokens, sampled: of `ppo_plan.Load.of`.
    """
    from configs import ppo_128k, ppo_128k_disaggregated, ppo_128k_v5p_256

    rows = [
        (slices, change(config.get_config()))
        for slices, config in (("v5p:4x4x8", ppo_128k), ("v5p:4x8x8", ppo_128k_v5p_256))
        for change in (lambda config: config, ppo_128k_disaggregated.disaggregated)
    ]
    progress, plans = Progress("table of plans", len(rows), "rows"), []
    quick = planning.Settings(quick=True, limit=settings.limit, cache=settings.cache)
    for name, config in rows:
        load = ppo_plan.Load.from_config(config, tokens, sampled)
        plans.append(ppo_plan.plan(config, topology.parse(name), quick, load))
        progress.update(slice=name)
    return plans

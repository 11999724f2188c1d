"""The sampler of a finished stage, from a run directory."""

from pathlib import Path

from stepdr_jax.engine.engine import JaxEngine
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import state
from stepdr_jax.training.compilation import keep_compiled


def of_stage(config, stage: str, *, slots: int, shards: int = 1) -> tuple[JaxEngine, Tokenizer]:
    """Returns the engine with a stage's weights, stopping at its turn's end, and the tokenizer.

    Raises UserError when the stage has not finished or its checkpoints are damaged.
    """
    run_dir = Path(config.run_dir)
    tokenizer = Tokenizer.load(run_dir / "tokenizer" / "tokenizer.json")
    keep_compiled(run_dir / ".jax_cache")
    engine = JaxEngine(
        state.load_params(config, config.seed, stage),
        Qwen2Config.from_config(config.model, state.vocab_size(config)),
        slots=slots,
        shards=shards,
        max_len=config.agent.max_episode_tokens,
        stop_ids=(tokenizer.im_end, tokenizer.endoftext),
    )
    return engine, tokenizer

"""The sampler with the weights of a finished stage."""


from stepdr_jax.engine import factory
from stepdr_jax.engine.engine import JaxEngine
from stepdr_jax.engine.remote import RemoteEngine
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime.compilation import enable_compilation_cache
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import state


def load_stage_engine(config, stage: str) -> tuple[JaxEngine | RemoteEngine, Tokenizer]:
    """The engine of `config.sampler` with the weights of a finished stage of a run directory, and the tokenizer.

    Raises UserError when the stage has not finished or its checkpoints are damaged.
    """
    layout = RunLayout.from_config(config)
    tokenizer = Tokenizer.load(layout.tokenizer)
    enable_compilation_cache(layout.compilation_cache)
    params = state.load_params(config, config.seed, stage)
    model = Qwen2Config.from_config(config.model, state.vocab_size(config))
    return factory.make_engine(config, params, model, tokenizer), tokenizer

"""Serves a trained checkpoint behind OpenAI's HTTP interface, for any client that speaks it.

    python -m launch.serve_model --port=8000
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is the capital of Austria?"}], "max_tokens": 100}'

Prints its address when it answers. A bearer token is read from $STEPDR_MODEL_TOKEN; without one it listens on loopback only.
"""

import os

from absl import flags

from launch import entry
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import stages

FLAGS = flags.FLAGS
flags.DEFINE_string("stage", "", f"checkpoint to serve: {', '.join(stages.policies())}; default the last finished")
flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
flags.DEFINE_integer("port", 8000, "port to listen on; 0: any free one")
flags.DEFINE_integer("slots", 16, "replies sampled together", lower_bound=1)


def main(config) -> None:
    from stepdr_jax.agent import server
    from stepdr_jax.engine import factory
    from stepdr_jax.orchestration import ask
    from stepdr_jax.training import sampler, state

    token = os.environ.get("STEPDR_MODEL_TOKEN", "")
    if not token and FLAGS.host not in ("127.0.0.1", "::1", "localhost"):
        raise UserError(f"--host={FLAGS.host} is open to others; set STEPDR_MODEL_TOKEN, or listen on 127.0.0.1")
    stage = ask.choose_stage(config, FLAGS.stage)
    engine, tokenizer = sampler.load_stage_engine(factory.with_max_num_seqs(config, FLAGS.slots), stage)
    most, rows = config.agent.max_episode_tokens, state.vocab_size(config)
    app = server.make_app(engine, tokenizer, model=stage, max_len=most, token=token, vocab_size=rows)
    server.serve_app(app, FLAGS.host, FLAGS.port)


if __name__ == "__main__":
    entry.run(main, __doc__)

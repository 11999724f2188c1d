"""PPO in the toy world, in a process that a test starts: python -m tests.rl.toy_process RUN_DIR [field=value ...]

fail=N: the first N tool calls of this process break. die=I: this process kills itself while it samples iteration I.
"""

import itertools
import json
import os
import signal
import sys

from launch import entry
from tests.rl import toy

FIELDS = {
    "mesh.fsdp": 4,
    "ppo.critic_warmup_iterations": 0,
    "ppo.critic_minibatches": 1,
    "sampler.pools": 1,
    "checkpointing.background": False,
}


def main(argv):
    run_dir, *fields = argv
    given = {name: json.loads(value) for name, value in (field.split("=", 1) for field in fields)}
    fail, die = given.pop("fail", 0), given.pop("die", -1)
    config = toy.config(run_dir, iterations=2, checkpoint_every=1).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(FIELDS | given)
    looks, episodes = itertools.count(), itertools.count()

    async def run_episode(*arguments, **keywords):
        if next(episodes) == die * 8 // config.distributed.processes + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return await toy.run_episode(*arguments, **keywords)

    def work(config):
        from stepdr_jax.rl import loop

        tools = toy.ToyTools(broken=lambda seed, attempt: next(looks) < fail)
        print(json.dumps(loop.train_ppo(config, toy.inputs(config, tools=tools, run_episode=run_episode))))

    sys.exit(entry.among_others(lambda: config.lock(), work))


if __name__ == "__main__":
    main(sys.argv[1:])

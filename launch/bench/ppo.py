"""Time of one PPO iteration against Tunix's PPO learner; `launch.bench ppo` runs it.

The same work on both sides, in float32, on single-turn episodes of one length: old log-probabilities and values of all
episodes, advantages, and for every minibatch one update of the critic and one of the actor, with the same optimizer.

Where it is not the same, by how Tunix works: it computes logits of prompts, too (as many as of sampled tokens here),
and it goes through these steps minibatch by minibatch, so later ones see updated networks. Ours also computes
entropies. Sampling and rewards are left out on both sides. With one minibatch nothing differs, and `update_correlation`
shows that both sides then change the parameters alike.
"""

import queue
import threading

import numpy as np

from launch.bench import peers

PROMPT, COMPLETION, MINIBATCHES = 128, 128, 4


def step(config, rounds: int, *, episodes: int, microbatch: int) -> dict:
    """Seconds of an iteration of both sides, in turns. microbatch: episodes in one forward and backward pass."""
    peers.require_tunix()
    from stepdr_jax.models.qwen2 import Qwen2Config
    from stepdr_jax.training import state

    model = Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)
    params = state.initial_params(model, config.seed)
    rng = np.random.default_rng(0)
    tokens_ET = rng.integers(0, model.vocab_size, (episodes, PROMPT + COMPLETION)).astype(np.int32)
    rewards_E = rng.integers(0, 2, episodes).astype(np.float32)

    def sides(minibatches: int):
        settings = config.copy_and_resolve_references()
        with settings.unlocked():
            settings.agent.max_episode_tokens = PROMPT + COMPLETION
            settings.ppo.actor_minibatches = settings.ppo.critic_minibatches = minibatches
            settings.ppo.critic_warmup_iterations = 0
            settings.ppo.microbatch_sequences = microbatch
            settings.ppo.guard.max_kl = settings.ppo.guard.min_entropy = 0.0  # the other side measures no divergence
        ours = OurStep(settings, params, model, tokens_ET, rewards_E)
        return ours, TunixStep(settings, params, model, tokens_ET, rewards_E)

    ours, theirs = sides(1)
    try:
        ours()
        theirs()
        correlation = _correlation(params, ours.state["params"], theirs.actor)
    finally:
        theirs.close()
    ours, theirs = sides(MINIBATCHES)
    try:
        times = peers.in_turns({"ours": ours, "tunix": theirs}, rounds)
    finally:
        theirs.close()
    return {
        "what": "ppo",
        "unit": "iterations per second, compilation, sampling and rewards excluded",
        **peers.comparison(1, times, 3),
        "update_correlation": correlation,
        "episodes": episodes,
        "tokens": {"prompt": PROMPT, "completion": COMPLETION},
        "minibatches": MINIBATCHES,
        "microbatch_sequences": microbatch,
        "model": dict(config.model),
        "vocabulary": model.vocab_size,
        **peers.conditions(rounds),
    }


def _correlation(before, ours, theirs) -> float:
    """Of the change of the last layer's down projection on both sides."""
    old, new = (np.asarray(tree["layers"]["down_kernel"][-1]).ravel() for tree in (before, ours))
    other = np.asarray(theirs.layers[-1].mlp.down_proj.kernel[...]).ravel()
    return float(np.corrcoef(new - old, other - old)[0, 1])


class OurStep:
    """An iteration of our learner on episodes of PROMPT given and COMPLETION sampled tokens."""

    def __init__(self, config, params, model, tokens_ET, rewards_E):
        import jax

        from stepdr_jax.rl import learner
        from stepdr_jax.rl.rollouts import EpisodeArrays

        self._update, self._settings = learner.update, learner.PPOConfig.from_config(config, model)
        state = learner.init_state(params, self._settings, jax.random.key(0))
        self.state = jax.device_put(state, jax.devices()[0])  # committed, as the loop has it: else all compiles twice
        mask_ET = np.zeros(tokens_ET.shape, bool)
        mask_ET[:, PROMPT:] = True
        lengths_E, kept_E = np.full(len(tokens_ET), PROMPT + COMPLETION, np.int32), np.ones(len(tokens_ET), bool)
        logprobs_ET = np.zeros(tokens_ET.shape, np.float32)
        self._episodes = EpisodeArrays(tokens_ET, lengths_E, mask_ET, logprobs_ET, rewards_E, kept_E)
        self._iteration = 0

    def __call__(self):
        import jax

        self.state, metrics, _ = self._update(self.state, self._episodes, self._settings, self._iteration)
        jax.block_until_ready(self.state)
        assert metrics["skipped_updates"] == 0
        self._iteration += 1


class TunixStep:
    """Tunix's PPOLearner, whose loop runs in a thread and is handed one batch a call.

    Its rollout is replaced by one that answers with the episodes at hand; all else, log-probabilities of the rollout's
    model included, is its own.
    """

    def __init__(self, config, params, model, tokens_ET, rewards_E):
        self._asked: queue.Queue = queue.Queue()
        self._answered: queue.Queue = queue.Queue()
        self._batch = {"prompts": np.array([str(index) for index in range(len(tokens_ET))])}
        learner = _learner(config, params, model, tokens_ET, rewards_E)
        self.actor = learner.rl_cluster.actor_trainer.model
        self._thread = threading.Thread(target=self._train, args=(learner,), daemon=True)
        self._thread.start()
        self._wait()

    def __call__(self):
        self._asked.put(self._batch)
        self._wait()

    def close(self):
        """Ends the loop and its own threads, which would keep the process from ending."""
        self._asked.put(None)
        self._thread.join()

    def _wait(self):
        outcome = self._answered.get()
        if outcome is not None:
            raise outcome

    def _train(self, learner):
        def batches():
            while True:
                self._answered.put(None)  # asked for the next batch: done with the one before
                batch = self._asked.get()
                if batch is None:
                    return
                yield batch

        try:
            learner.train(batches())
        except Exception as error:
            self._answered.put(error)


def _learner(config, params, model, tokens_ET, rewards_E):
    import dataclasses

    import jax
    from tunix.rl import rl_cluster
    from tunix.rl import utils as rl_utils
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.rollout import base_rollout, vanilla_rollout

    from stepdr_jax.rl import ppo

    class Recorded(vanilla_rollout.VanillaRollout):
        """Answers prompt "i" with episode i; the rest is Tunix's sampler."""

        def __init__(self, rollout_actor, tokenizer, mesh, rollout_config):
            del mesh, rollout_config
            size = base_rollout.CacheConfig(256, model.num_layers, model.num_kv_heads, model.head_dim)
            super().__init__(rollout_actor, tokenizer, size)

        def generate(self, prompts, rollout_config, **kwargs):
            episodes_ET = tokens_ET[[int(prompt) for prompt in prompts]]
            texts = [str(prompt) for prompt in prompts]
            return base_rollout.RolloutOutput(texts, [], list(episodes_ET[:, PROMPT:]), episodes_ET[:, :PROMPT], None)

    def reward(prompts, completions, **kwargs):
        return [float(rewards_E[int(prompt)]) for prompt in prompts]

    p = config.ppo
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=ppo.make_optimizer(p.actor_learning_rate, p.warmup_steps, p.beta2, p.clip_norm),
        critic_optimizer=ppo.make_optimizer(p.critic_learning_rate, p.warmup_steps, p.beta2, p.clip_norm),
        eval_every_n_steps=1 << 40,
        max_steps=1 << 40,
        mini_batch_size=len(tokens_ET) // p.actor_minibatches,
        train_micro_batch_size=p.microbatch_sequences,
        compute_logps_micro_batch_size=p.microbatch_sequences,
        rollout_micro_batch_size=len(tokens_ET) // p.actor_minibatches,  # what advantages are whitened over
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.CRITIC, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    # A critic is a model whose unembedding is replaced by a head of one value.
    untied = dataclasses.replace(model, tie_embeddings=False)
    critic = rl_utils.create_critic_model(peers.tunix_model(untied, {"unembedding": params["embedding"]} | params))
    critic.lm_head.kernel[...] = np.zeros_like(critic.lm_head.kernel[...])  # as ours starts
    cluster = rl_cluster.RLCluster(
        actor=peers.tunix_model(model, params),
        critic=critic,
        tokenizer=peers.NumberTokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=Recorded,
            training_config=training,
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=COMPLETION, max_prompt_length=PROMPT, temperature=p.temperature
            ),
        ),
    )
    settings = ppo_learner.PPOConfig(
        gamma=p.gamma, gae_lambda=p.gae_lambda, beta=0.0, epsilon=p.clip, clip_range_value=p.value_clip
    )
    return ppo_learner.PPOLearner(cluster, settings, reward_fns=reward)

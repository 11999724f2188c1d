"""How fast PPO could be: bounds of the sampler from its memory traffic and arithmetic, and of an iteration from its
tokens.

Estimates from formulas, published speeds and the compiled programs' transfers; nothing is a measurement.
"""

import math

from ml_collections import ConfigDict

from stepdr_jax.aot import plan as planning
from stepdr_jax.aot import roofline
from stepdr_jax.models.flops import layer_parameters
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.sharding.topology import Topology

ASSUMPTIONS = (
    "a host's episodes of mean length are at all stages of their growth at once: K/V of half that length each",
    "none waits for a tool, and the last ones of an iteration run in as large a company as the first",
    "K/V is read once a step, weights once; their traffic and the arithmetic overlap, transfers within a replica do "
    "not",
    "sequences of the learner hold whole episodes of mean length",
    "the links' latency is not counted, nor time for tools, judges, checkpoints, the host's memory "
    "(placement.offload) or the network between hosts",
)


def kv_bytes(model: Qwen2Config) -> int:
    """Bytes of one token's K/V in all layers."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * (2 if model.dtype == "bfloat16" else 4)


def decode(model: Qwen2Config, *, sequences: int, length: float, tensor: int, slices: Topology, transfers=()) -> dict:
    """Bounds of one decode step of a replica.

    Args:
        model: shape.
        sequences: decoded together.
        length: tokens of K/V of each, in the mean.
        tensor: devices of the replica.
        slices: their kind.
        transfers: of a step, as `collectives.summarise` has them.

    Returns:
        {"bytes_weights", "bytes_kv", "flops"} of one device, {"seconds"} by cause and of the step, "tokens_per_second"
        of the replica, "tokens_per_second_hbm" if nothing but its memory's speed bound it, "bound".
    """
    speeds, width = slices.generation.speeds, 2 if model.dtype == "bfloat16" else 4
    kernels = model.num_layers * layer_parameters(model) + model.hidden_size * model.vocab_size
    weights, kv = width * kernels / tensor, sequences * length * kv_bytes(model) / tensor
    flops = sequences * (2 * kernels + 4 * model.num_heads * model.head_dim * model.num_layers * length) / tensor
    seconds = {
        "hbm": (weights + kv) / speeds.hbm,
        "arithmetic": flops / speeds.flops,
        "transfers": sum(t["times"] * roofline.seconds_of(t, slices) for t in transfers if not t["hidden"]),
    }
    seconds["step"] = max(seconds["hbm"], seconds["arithmetic"]) + seconds["transfers"]
    return {
        "bytes_weights": weights,
        "bytes_kv": kv,
        "flops": flops,
        "seconds": seconds,
        "tokens_per_second": sequences / seconds["step"],
        "tokens_per_second_hbm": sequences / seconds["hbm"],
        "bound": max(("hbm", "arithmetic", "transfers"), key=seconds.get),
    }


def prefill(
    model: Qwen2Config, *, sequences: int, chunk: int, length: float, tensor: int, slices: Topology, transfers=()
) -> dict:
    """Bounds of one prefill call of `sequences` chunks at a mean position of `length`: seconds by cause,
    tokens_per_second."""
    speeds, width, tokens = slices.generation.speeds, 2 if model.dtype == "bfloat16" else 4, sequences * chunk
    kernels = model.num_layers * layer_parameters(model)
    products = 2 * kernels * tokens / tensor / (speeds.flops * roofline.PRODUCTS)
    pairs = 4 * model.num_heads * model.head_dim * model.num_layers * tokens * length
    seconds = {
        "arithmetic": products + pairs / tensor / (speeds.flops * roofline.KERNEL),
        "hbm": (width * kernels + sequences * length * kv_bytes(model)) / tensor / speeds.hbm,
        "transfers": sum(t["times"] * roofline.seconds_of(t, slices) for t in transfers if not t["hidden"]),
    }
    seconds["call"] = max(seconds["arithmetic"], seconds["hbm"]) + seconds["transfers"]
    bound = max(("hbm", "arithmetic", "transfers"), key=seconds.get)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds["call"], "bound": bound}


def estimate(config: ConfigDict, held: dict, hosts: int, slices: Topology, load, episodes: dict) -> dict:
    """The sampler's bounds and those of an iteration.

    Args:
        config: the run's config.
        held: compiled programs by name.
        hosts: with a sampler each.
        slices: where.
        load: `ppo_plan.Load`.
        episodes: of `ppo_plan`'s placement: how many run at once.

    Returns:
        sampler {decode, decode_full, prefill, tokens_per_second of all hosts}; iteration {episodes, tokens, calls and
        seconds by program, seconds}; assumptions.
    """
    model, s, c = planning.model_of(config), config.sampler, config.ppo
    replicas, parts = s.replicas * hosts, s.pools  # a replica's shards take turns on its devices
    common = dict(tensor=s.tensor, slices=slices)
    step = [t | {"times": t["times"] / s.decode_steps} for t in held["decode"]["collectives"]]
    share = -(-c.prompts_per_iteration * c.samples_per_prompt // hosts)  # of an iteration's episodes
    sequences = max(min(episodes["mean_length_per_host"], share) // (s.replicas * parts), 1)
    full = max(min(episodes["full_length_per_host"], share) // (s.replicas * parts), 1)
    mean = decode(model, sequences=sequences, length=load.tokens / 2, transfers=step, **common)
    longest = decode(model, sequences=full, length=config.agent.max_episode_tokens, transfers=step, **common)
    chunks = dict(sequences=min(s.prefill_batch, s.max_num_seqs), chunk=s.prefill_chunk, length=load.tokens / 2)
    filled = prefill(model, transfers=held["prefill"]["collectives"], **chunks, **common)

    count, per_row = c.prompts_per_iteration * c.samples_per_prompt, config.agent.max_episode_tokens // load.tokens
    sampled, given = count * load.sampled, count * (load.tokens - load.sampled)
    sampling = {
        "decode": sampled / (mean["tokens_per_second"] * replicas),
        "prefill": given / (filled["tokens_per_second"] * replicas),
    }

    def calls(groups: int) -> int:
        return groups * math.ceil(math.ceil(count / groups / per_row) / c.microbatch_sequences)

    number = {
        "logprobs": calls(1) * (2 if c.kl_coefficient else 1),
        "values": calls(1),
        "critic": calls(c.critic_minibatches),
        "actor": calls(c.actor_minibatches),
        "update_critic": c.critic_minibatches,
        "update_actor": c.actor_minibatches,
    }
    each = {name: _seconds(config, model, name, held[name], slices) for name in number}
    learning = {name: number[name] * each[name] for name in number}
    way = held["decode"]["argument_bytes"]["sampler weights"] / slices.generation.speeds.link
    turns = sum(sampling.values()), sum(learning.values())
    ahead = config.placement.sampler == "disaggregated" and c.staleness > 0  # both at once
    return {
        "label": "estimate, not measured",
        "sampler": {
            "decode": mean | {"sequences": sequences, "length": load.tokens / 2},
            "decode_full": longest | {"sequences": full, "length": config.agent.max_episode_tokens},
            "prefill": filled,
            "tokens_per_second": mean["tokens_per_second"] * replicas,
            "tokens_per_second_hbm": mean["tokens_per_second_hbm"] * replicas,
            "prefill_tokens_per_second": filled["tokens_per_second"] * replicas,
        },
        "iteration": {
            "episodes": count,
            "sampled_tokens": sampled,
            "observed_tokens": given,
            "calls": number,
            "seconds_each": each,
            "seconds": sampling | learning | {"weights": way},
            "seconds_sampling": turns[0],
            "seconds_learning": turns[1],
            "seconds_total": (max(turns) if ahead else sum(turns)) + way,
        },
        "assumptions": [*ASSUMPTIONS, *roofline.ASSUMPTIONS[:4]],
    }


def _seconds(config: ConfigDict, model: Qwen2Config, name: str, program: dict, slices: Topology) -> float:
    """One execution of a learner's program."""
    if name.startswith("update"):
        held = program["memory"]
        return (held["arguments"] + held["outputs"]) / slices.generation.speeds.hbm
    mesh, sequences, seq_len = config.mesh, config.ppo.microbatch_sequences, config.agent.max_episode_tokens
    backward = name in ("actor", "critic")
    work = roofline.work_of(
        model,
        seq_len=seq_len,
        batch_size=sequences,
        remat=config.ppo.remat,
        strategy=config.parallel.context_strategy,
        shards=mesh.context,
        zigzag=config.parallel.zigzag,
        backward=backward,
        vocabulary=name in ("actor", "logprobs"),
    )
    local = seq_len * sequences // (mesh.data * mesh.fsdp * mesh.context)
    hbm = roofline.hbm_bytes(model, mesh, tokens=local, remat=config.ppo.remat, backward=backward)
    devices = mesh.data * mesh.fsdp * mesh.context * mesh.tensor
    share = slices.devices / devices  # with placement.sampler=disaggregated the learner has only a part of the slice
    found = roofline.estimate(work, hbm, program["collectives"], slices, tokens=seq_len * sequences)["seconds"]
    arithmetic = (found["products"] + found["attention"]) * share
    return max(arithmetic, found["hbm"], found["hidden_transfers"]) + found["exposed_transfers"]

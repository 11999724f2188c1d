"""The plan of PPO on a TPU slice: what each phase of an iteration holds on a chip, how many episodes run at once, how
long.

Memory of programs is the compiler's; what lies beside them follows from `rl.placement`: colocated, the sampler's
weights and pages are there only while it works, and with offload idle the learner's state only while its network does.
"""

import copy
import dataclasses
import math

from ml_collections import ConfigDict

from stepdr_jax.aot import collectives, compile, ppo_speed
from stepdr_jax.aot import plan as planning
from stepdr_jax.errors import UserError
from stepdr_jax.sharding import topology
from stepdr_jax.sharding.mesh import AXES

STATE = ("actor weights", "actor moments", "critic weights", "critic moments")
# phase -> (its program, what of the learner's state is at work)
LEARNING = {
    "old log-probabilities": ("logprobs", ("actor weights", "reference weights")),
    "old values": ("values", ("critic weights",)),
    "critic learns": ("critic", ("critic weights", "critic moments")),
    "critic's update": ("update_critic", ("critic weights", "critic moments")),
    "actor learns": ("actor", ("actor weights", "actor moments")),
    "actor's update": ("update_actor", ("actor weights", "actor moments")),
}
PROGRAMS = (*(program for program, _ in LEARNING.values()), "decode", "prefill", "transfer")
OFFLOADS = ("none", "idle")


@dataclasses.dataclass(frozen=True)
class Load:
    """What an episode is taken to be in the mean: tokens in all, and of these sampled ones; the others are
    prefilled."""

    tokens: int
    sampled: int

    @classmethod
    def from_config(cls, config: ConfigDict, tokens: int = 0, sampled: int = 0) -> "Load":
        """By default a quarter of the longest episode, and a quarter of it sampled. Raises UserError for more than
        there is."""
        longest = config.agent.max_episode_tokens
        tokens = tokens or longest // 4
        sampled = sampled or tokens // 4
        if not 0 < tokens <= longest:
            raise UserError(f"--episode_tokens: expected 1 to agent.max_episode_tokens {longest}, got {tokens}")
        if not 0 < sampled <= tokens:
            raise UserError(f"--sampled_tokens: expected 1 to the episode's {tokens}, got {sampled}")
        return cls(tokens, sampled)


def plan(config: ConfigDict, slices: topology.Topology, settings: planning.Settings, load: Load) -> dict:
    """Compiles PPO's programs and returns the plan, plain data; docs/plans.md explains its fields.

    Raises:
        UserError: the mesh or the sampler is not that of the slice, a size does not divide, libtpu is missing, time ran
            out.
    """
    held = {name: _compiled(config, slices, name, settings) for name in PROGRAMS}
    hosts = slices.devices // held["decode"]["host_devices"]
    made = {
        "schema": planning.SCHEMA,
        "config": config.name,
        "stage": "ppo",
        "topology": str(slices),
        "chips": slices.chips,
        "devices": slices.devices,
        "hosts": hosts,
        "limit_bytes": slices.generation.hbm,
        "mesh": {axis: config.mesh[axis] for axis in AXES},
        "seq_len": config.agent.max_episode_tokens,
        "microbatch_sequences": config.ppo.microbatch_sequences,
        "parallel": config.parallel.to_dict() | {"remat": config.ppo.remat},
        "placement": config.placement.to_dict(),
        "sampler": config.sampler.to_dict() | {"urls": list(config.sampler.urls)},
        "load": dataclasses.asdict(load),
        "programs": held,
    }
    short = [name for name, program in held.items() if program["status"] != "fits"]
    if short:
        advice = {name: _advise(config, slices, name, held[name], settings) for name in short}
        return made | {"fits": False, "advice": advice}
    placements = [_placement(config, offload, held, hosts, slices, load) for offload in OFFLOADS]
    own = next(p for p in placements if p["offload"] == config.placement.offload)
    speed = ppo_speed.estimate(config, held, hosts, slices, load, own["episodes"])
    advice = {} if own["fits"] else {"together": _advise_together(config, own, placements)}
    return made | {"fits": own["fits"], "placements": placements, "estimate": speed, "advice": advice}


def _compiled(config, slices, name, settings: planning.Settings) -> dict:
    save = str(settings.save / f"{config.name}-ppo-{name}-{slices}.pickle") if settings.save else ""
    request = compile.Request(config, "ppo", name, str(slices), save=save, quick=settings.quick and not save)
    result = compile.compile_program(request, limit=settings.limit, cache=settings.cache, label=f"{name} of ppo")
    if result["status"] == "fits" and name not in ("decode", "prefill"):
        model = planning.model_of(config)
        smallest = model.hidden_size * model.num_kv_heads * model.head_dim // config.mesh.tensor
        result["lint"] = [] if name == "transfer" else collectives.lint(result["collectives"], smallest)
    return result


def state_bytes(config: ConfigDict, held: dict) -> dict[str, int]:
    """Bytes on one of the learner's devices of all that it keeps between iterations, by buffer."""
    found = {
        buffer: size
        for program in held.values()
        for buffer, size in program["argument_bytes"].items()
        if buffer in STATE
    }
    state = {buffer: found[buffer] for buffer in STATE}
    if config.ppo.kl_coefficient:
        state["reference weights"] = state["actor weights"]
    if config.ppo.staleness:
        state["behaviour weights"] = state["actor weights"]
    return state


def phases(config: ConfigDict, offload: str, held: dict) -> list[dict]:
    """What is on a device in each phase of an iteration: {"phase", "device" (learner, sampler or any), "bytes" by
    buffer, "total"}."""
    state, colocated = state_bytes(config, held), config.placement.sampler == "colocated"
    sampler = {buffer: held["decode"]["argument_bytes"][buffer] for buffer in ("sampler weights", "pages")}

    def kept(*working: str) -> dict[str, int]:
        return {buffer: size for buffer, size in state.items() if offload == "none" or buffer in working}

    def row(phase: str, device: str, there: dict[str, int], program: dict) -> dict:
        given = {buffer: size for buffer, size in program["argument_bytes"].items() if buffer.endswith("gradient")}
        counted = sum(
            size
            for buffer, size in program["argument_bytes"].items()
            if buffer in there or buffer == "part of actor weights"
        )
        rest = program["memory"]["total"] - counted - sum(given.values())
        parts = there | given | {"temporaries": rest}
        return {"phase": phase, "device": device, "bytes": parts, "total": sum(parts.values())}

    learner = "any" if colocated else "learner"
    arrived = {"sampler weights": sampler["sampler weights"]} if colocated else {}
    read = "behaviour weights" if "behaviour weights" in state else "actor weights"
    tighter = max(("decode", "prefill"), key=lambda name: held[name]["memory"]["total"])
    rows = [
        row("weights on their way", learner, kept(read) | arrived, held["transfer"]),
        row("sampling", "any" if colocated else "sampler", (kept() if colocated else {}) | sampler, held[tighter]),
    ]
    return rows + [row(phase, learner, kept(*working), held[name]) for phase, (name, working) in LEARNING.items()]


def _placement(config, offload, held, hosts, slices, load: Load) -> dict:
    listed, limit = phases(config, offload, held), slices.generation.hbm
    sampling = next(row for row in listed if row["phase"] == "sampling")
    s, pages = config.sampler, held["decode"]["argument_bytes"]["pages"]
    replicas = s.replicas * s.pools
    count = s.num_pages // replicas if s.num_pages else (s.max_num_seqs // replicas) * _columns(config)
    page_bytes = pages / count
    room = int((limit - (sampling["total"] - pages)) // page_bytes)
    state = sum(state_bytes(config, held).values())
    learners = math.prod(config.mesh[axis] for axis in AXES) // hosts
    return {
        "sampler": config.placement.sampler,
        "offload": offload,
        "fits": all(row["total"] <= limit for row in listed),
        "phases": listed,
        "learning_bytes": max(row["total"] for row in listed if row["phase"] in LEARNING),
        "sampling_bytes": sampling["total"],
        "page_bytes": int(page_bytes),
        "pages": count,
        "pages_that_fit": max(room, 0),
        "episodes": _episodes(config, count, replicas, hosts, load),
        "episodes_that_fit": _episodes(config, max(room, 0), replicas, hosts, load, slots=False),
        "host_bytes": learners * state if offload == "idle" else 0,
    }


def _columns(config: ConfigDict) -> int:
    return -(-config.agent.max_episode_tokens // (config.sampler.page_size or config.agent.max_episode_tokens))


def _episodes(config, pages: int, replicas: int, hosts: int, load: Load, *, slots: bool = True) -> dict:
    """Episodes that so many pages of each replica hold at once, `of full length` and `of mean length`, and that decode
    together where `slots` are counted; per host and in all."""
    page = config.sampler.page_size or config.agent.max_episode_tokens
    most = config.sampler.max_num_seqs // replicas if slots else pages
    full, mean = (min(most, pages // -(-size // page)) for size in (config.agent.max_episode_tokens, load.tokens))
    return {
        "full_length_per_host": full * replicas,
        "full_length": full * replicas * hosts,
        "mean_length_per_host": mean * replicas,
        "mean_length": mean * replicas * hosts,
    }


def _advise(config, slices, name, program, settings) -> list[str]:
    """What to change for a program that does not fit by itself; a number of pages named has been compiled."""
    over = program["shortage"]["needed"] - program["shortage"]["limit"]
    if name in ("decode", "prefill"):
        s, pages = config.sampler, program["argument_bytes"]["pages"]
        replicas = s.replicas * s.pools
        count = s.num_pages // replicas if s.num_pages else (s.max_num_seqs // replicas) * _columns(config)
        fewer = (count - math.ceil(over * 1.02 / (pages / count))) * replicas
        said = []
        if fewer >= _columns(config) * replicas and _columns(config) > 1:
            other = copy.deepcopy(config).unlock()
            other.sampler.num_pages = fewer
            if _compiled(other.lock(), slices, name, settings)["status"] == "fits":
                said.append(f"sampler.num_pages={fewer} fits (compiled); {count * replicas} do not")
        if not said:
            said.append(
                f"the weights take {program['buffers']['sampler weights'] / 2**30:.1f} GiB of each device: no pages fit"
            )
        return [*said, "sampler.tensor twice as large halves weights and pages on a device"]
    sequences = config.mesh.data * config.mesh.fsdp
    said = [f"ppo.remat={r} keeps less for the backward pass" for r in _weaker(config)[:1] if "update" not in name]
    if config.ppo.microbatch_sequences > sequences:
        said.append(f"ppo.microbatch_sequences={sequences}, one for each of data * fsdp, is the fewest")
    if config.parallel.vocab_tiles < planning.tiles_of(config):
        said.append(f"parallel.vocab_tiles={planning.tiles_of(config)} never has the whole unembedding on a device")
    said.append("mesh.context twice as large, or a slice of twice the chips, halves the tokens of a device")
    return said


def _weaker(config) -> tuple[str, ...]:
    ladder = planning.REMAT_LADDER
    return ladder[ladder.index(config.ppo.remat) + 1 :]


def _advise_together(config, own: dict, placements: list[dict]) -> list[str]:
    worst = max(own["phases"], key=lambda row: row["total"])
    said = [
        f"each program fits alone, but in the phase '{worst['phase']}' a device holds {worst['total'] / 2**30:.2f} GiB"
    ]
    if worst["phase"] == "sampling":
        replicas = config.sampler.replicas * config.sampler.pools
        said.append(f"sampler.num_pages={own['pages_that_fit'] * replicas} fit beside what is there")
    other = next(p for p in placements if p is not own)
    if other["fits"]:
        said.append(f"placement.offload={other['offload']} fits as it is")
    return said

"""How long a step would take: an estimate from formulas and the compiled schedule, never a measurement.

XLA's own cost analysis is not used: it counts the body of a loop once and a Pallas kernel as nothing. FLOPs come from
the model's shape, transfers from the HLO (bytes x executions), speeds from `sharding.hardware`.
"""

import dataclasses

from stepdr_jax.models.flops import layer_parameters
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.ops.context_layout import hop_pairs
from stepdr_jax.sharding.topology import Topology

PRODUCTS = 0.85  # share of peak FLOP/s that matrix products are taken to reach
KERNEL = 0.5  # share that the attention kernel is taken to reach
ASSUMPTIONS = (
    f"matrix products run at {PRODUCTS:.0%} and attention at {KERNEL:.0%} of peak bfloat16 FLOP/s",
    "an axis is one ring of links used both ways (half as fast where the slice does not wrap); links do not share load",
    "synchronous transfers and those with no kernel or product beside them add to the step; the others are hidden "
    "up to "
    "the time of the arithmetic",
    "HBM traffic is a formula: optimizer state, gathered weights, inputs and outputs of each product",
    "with remat=offload, traffic to the host's memory is hidden",
    "no time for the host, for data, or for the launch of kernels",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one step on all devices. `model_*`: what the mathematics asks for (causal attention; matrix products
    without the embedding); MFU counts these. `done_*`: what is executed, recomputation and imbalance included."""

    model_products: float
    model_attention: float
    done_products: float
    done_attention: float

    @property
    def model(self) -> float:
        return self.model_products + self.model_attention


def work_of(
    model: Qwen2Config,
    *,
    seq_len: int,
    batch_size: int,
    remat: str,
    strategy: str,
    shards: int,
    zigzag: bool,
    backward: bool = True,
    vocabulary: bool = True,
) -> Work:
    """FLOPs of a step.

    Args:
        model: shape.
        seq_len, batch_size: tokens of a sequence, sequences of a step; a sequence is counted as one segment.
        remat, strategy, zigzag: of config.parallel; shards: mesh.context.
        backward: False for programs without gradients.
        vocabulary: False for the critic, which has no unembedding.
    """
    tokens, L = seq_len * batch_size, model.num_layers
    layers = 2 * L * layer_parameters(model) * tokens
    head = 2 * model.hidden_size * model.vocab_size * tokens if vocabulary else 0
    pair = 4 * model.num_heads * model.head_dim * L * batch_size
    attention = pair * seq_len * (seq_len + 1) / 2
    imbalance = 1.0
    if shards > 1 and strategy != "ulysses":
        pairs = hop_pairs(seq_len, strategy=strategy, axis_size=shards, zigzag=zigzag)
        imbalance = sum(pairs) * shards / (seq_len * (seq_len + 1) / 2)
    if not backward:
        return Work(layers + head, attention, layers + head, attention * imbalance)
    again = remat != "none"
    down = 2 * L * model.hidden_size * model.intermediate_size * tokens  # its output is not needed a second time
    products = 3 * (layers + head) + head + (layers - down if again else 0)  # the loss computes its logits twice
    # Forward: 2 products. Backward: 3 for dq and 4 for dk and dv, as each of the two kernels recomputes the scores.
    kernels = 1 + 3.5 + (1 if remat in ("layer", "offload") else 0)
    return Work(3 * (layers + head), 3 * attention, products, kernels * attention * imbalance)


def hbm_bytes(model: Qwen2Config, mesh: dict[str, int], *, tokens: int, remat: str, backward: bool = True) -> float:
    """Traffic of one device to its memory in a step; tokens: of one device."""
    width, D, K = (2 if model.dtype == "bfloat16" else 4), model.hidden_size, model.head_dim
    tensor = mesh["tensor"]
    shards = mesh["fsdp"] * mesh["context"] * tensor
    layer, head = layer_parameters(model), model.hidden_size * model.vocab_size
    parameters = model.num_layers * layer + head * (1 if model.tie_embeddings else 2)
    passes = (2 + (remat != "none") + 1) if backward else 1
    weights = passes * 2 * width * (model.num_layers * layer + head) / tensor
    per_token = (
        8 * D + (4 * model.num_heads + 4 * model.num_kv_heads) * K / tensor + 6 * model.intermediate_size / tensor
    )
    activations = passes * width * tokens * model.num_layers * per_token
    state = 32 * parameters / shards if backward else 4 * parameters / shards  # read and write master, m, v, gradient
    return weights + activations + state


def seconds_of(transfer: dict, slices: Topology) -> float:
    """One execution of a transfer of `collectives.summarise` on its links, with nothing else on them."""
    n, size, speeds = transfer["group"], transfer["bytes"], slices.generation.speeds
    if slices.slices > 1 and "data" in transfer["axes"]:  # the slower network between slices bounds it
        rate = slices.generation.dcn / slices.generation.devices_per_chip
        return size * (2 if transfer["kind"] == "all-reduce" else 1) * (slices.slices - 1) / slices.slices / rate
    ring = speeds.link * (2 if any(slices.wrap) else 1)
    if transfer["kind"] == "collective-permute":
        return size / speeds.link
    if transfer["kind"] in ("all-to-all", "ragged-all-to-all"):
        return size * n / 4 / ring
    return size * (n - 1) / n / ring * (2 if transfer["kind"] == "all-reduce" else 1)


def estimate(work: Work, hbm: float, transfers: list[dict], slices: Topology, *, tokens: int) -> dict:
    """Seconds of a step by cause, and what follows from them.

    Args:
        work: of the step.
        hbm: bytes of one device.
        transfers: from collectives.summarise.
        tokens: in a step.

    Returns:
        products, attention, hbm, hidden, exposed and step seconds; tokens_per_second, tokens_per_second_per_chip, mfu
        (model FLOPs over peak), bound (what the step mostly is), assumptions.
    """
    speeds, devices = slices.generation.speeds, slices.devices
    products = work.done_products / devices / (speeds.flops * PRODUCTS)
    attention = work.done_attention / devices / (speeds.flops * KERNEL)
    memory = hbm / speeds.hbm
    hidden = sum(t["times"] * seconds_of(t, slices) for t in transfers if t["hidden"])
    exposed = sum(t["times"] * seconds_of(t, slices) for t in transfers if not t["hidden"])
    inside = {"arithmetic": products + attention, "HBM": memory, "hidden transfers": hidden}
    step = max(inside.values()) + exposed
    bound = max(inside, key=inside.get) if max(inside.values()) >= exposed else "exposed transfers"
    return {
        "label": "estimate, not measured",
        "seconds": {
            "products": products,
            "attention": attention,
            "hbm": memory,
            "hidden_transfers": hidden,
            "exposed_transfers": exposed,
            "step": step,
        },
        "tokens_per_second": tokens / step,
        "tokens_per_second_per_chip": tokens / step / slices.chips,
        "mfu": work.model / step / devices / speeds.flops,
        "bound": bound,
        "assumptions": list(ASSUMPTIONS),
    }

"""AdamW, and learning rate schedules: WSD (warm-up, stable, decay), cosine, constant."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

# Suffixes of parameters without weight decay, as in Qwen2.5 and most decoders
_NOT_DECAYED = ("norm", "bias")


def wsd_schedule(
    *, steps: int, warmup_steps: int, decay_share: float, learning_rate: float, final_learning_rate: float
) -> optax.Schedule:
    """Rises linearly over `warmup_steps`, holds `learning_rate`, and falls linearly over the last `decay_share`.

    Warm-up and decay are shortened when they do not fit into `steps`. The rate at step 0 is above 0, so that no step is
    wasted.
    """
    warmup = min(warmup_steps, steps)
    decay = min(int(round(decay_share * steps)), steps - warmup)
    pieces = [
        optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1)),
        optax.constant_schedule(learning_rate),
        optax.linear_schedule(learning_rate, final_learning_rate, max(decay, 1)),
    ]
    return optax.join_schedules(pieces, [warmup, steps - decay])


def cosine_schedule(
    *, steps: int, warmup_steps: int, learning_rate: float, final_learning_rate: float
) -> optax.Schedule:
    """Rises as `wsd_schedule` does, then falls along half a cosine to `final_learning_rate` at the last step."""
    warmup = min(warmup_steps, steps)
    pieces = [
        optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1)),
        optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), alpha=final_learning_rate / learning_rate),
    ]
    return optax.join_schedules(pieces, [warmup])


def make_schedule(stage: ConfigDict) -> optax.Schedule:
    """The schedule that a training stage's section of the config describes (config.midtrain1)."""
    common = dict(
        steps=stage.steps,
        warmup_steps=stage.warmup_steps,
        learning_rate=stage.learning_rate,
        final_learning_rate=stage.final_learning_rate,
    )
    if stage.schedule == "cosine":
        return cosine_schedule(**common)
    decay_share = 0.0 if stage.schedule == "constant" else stage.decay_share
    return wsd_schedule(**common, decay_share=decay_share)


def make_optimizer(stage: ConfigDict) -> optax.GradientTransformation:
    """The optimizer that a training stage's section of the config describes."""
    return adamw(make_schedule(stage), weight_decay=stage.weight_decay, beta2=stage.beta2)


def adamw(
    schedule: optax.Schedule | float, *, weight_decay: float = 0.0, beta2: float = 0.95
) -> optax.GradientTransformation:
    """AdamW; norms and biases are not decayed. Gradients are clipped before it (`step.apply_gradient`)."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(_NOT_DECAYED), params)

    return optax.adamw(schedule, b1=0.9, b2=beta2, eps=1e-8, weight_decay=weight_decay, mask=decayed)

"""AdamW under a warm-up, stable, decay schedule."""

import jax
import optax

# Qwen2.5 and most decoders decay matrices only
_NOT_DECAYED = ("norm", "bias")


def wsd_schedule(
    *, steps: int, warmup_steps: int, decay_share: float, learning_rate: float, final_learning_rate: float
) -> optax.Schedule:
    """Rises linearly over `warmup_steps`, holds `learning_rate`, and falls linearly over the last `decay_share`.

    Warm-up and decay are cut to the training's length when they do not fit. The rate at step 0 is not 0, so that no
    step is wasted.
    """
    warmup = min(warmup_steps, steps)
    decay = min(int(round(decay_share * steps)), steps - warmup)
    pieces = [
        optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1)),
        optax.constant_schedule(learning_rate),
        optax.linear_schedule(learning_rate, final_learning_rate, max(decay, 1)),
    ]
    return optax.join_schedules(pieces, [warmup, steps - decay])


def schedule_of(stage) -> optax.Schedule:
    """The schedule of a training stage's config (config.midtrain1 and its like)."""
    return wsd_schedule(
        steps=stage.steps,
        warmup_steps=stage.warmup_steps,
        decay_share=stage.decay_share,
        learning_rate=stage.learning_rate,
        final_learning_rate=stage.final_learning_rate,
    )


def optimizer_of(stage) -> optax.GradientTransformation:
    """The optimizer of a training stage's config."""
    return adamw(schedule_of(stage), weight_decay=stage.weight_decay, beta2=stage.beta2)


def adamw(
    schedule: optax.Schedule | float, *, weight_decay: float = 0.0, beta2: float = 0.95
) -> optax.GradientTransformation:
    """AdamW with float32 moments; norms and biases are not decayed. Clipping is the step's business, not this one's."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(_NOT_DECAYED), params)

    return optax.adamw(schedule, b1=0.9, b2=beta2, eps=1e-8, weight_decay=weight_decay, mask=decayed)

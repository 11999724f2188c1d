"""Which rates a stage has at which step: its opening, its mixture, and changes to it."""

from collections.abc import Mapping, Sequence

from stepdr_jax.errors import UserError

Stages = list[tuple[int, dict[str, float]]]  # (first step, component -> rate above 0), ascending from step 0


def stages(
    mixture: Mapping[str, float], remix: Sequence = (), opening: tuple[str, int] = ("", 0), stage: str = ""
) -> Stages:
    """Returns the rates of a stage by step.

    Args:
        mixture: component -> rate.
        remix: (step, component -> rate) of changes from that step on; what they do not name stays as it was.
        opening: a component that the first n steps read alone, and n.
        stage: the stage's name, for errors.

    Raises UserError for steps that do not ascend, an opening outside the mixture, negative rates and a mixture of nothing.
    """
    rates = {name: float(rate) for name, rate in mixture.items()}
    found = [(0, _positive(rates, f"{stage}.mixture"))]
    for entry in remix:
        try:
            step, changes = entry
            step, rates = int(step), rates | {name: float(rate) for name, rate in dict(changes).items()}
        except (TypeError, ValueError):
            raise UserError(f"{stage}.remix: expected (step, dict(component=rate)), got {entry!r}") from None
        if step <= found[-1][0]:
            raise UserError(f"{stage}.remix: expected steps that ascend from 1, got {step} after {found[-1][0]}")
        found.append((step, _positive(rates, f"{stage}.remix from step {step}")))
    first, steps = opening
    if steps:
        if first not in found[0][1]:
            raise UserError(
                f"expected {stage}.warmup_data to be a component of its mixture ({', '.join(found[0][1])}), got {first!r}"
            )
        under = [rates for step, rates in found if step <= steps]
        found = [(0, {first: 1.0}), (steps, under[-1]), *((step, rates) for step, rates in found if step > steps)]
    return found


def components(settings, stage: str = "") -> list[str]:
    """Returns the components that a stage reads at any step, sorted. `settings`: the stage's section of a config."""
    return sorted(
        {name for _, rates in stages(settings.mixture, settings.mixture_schedule, stage=stage) for name in rates}
    )


def _positive(rates: dict[str, float], where: str) -> dict[str, float]:
    if any(rate < 0 for rate in rates.values()):
        raise UserError(f"{where}: expected rates from 0 up, got {rates}")
    positive = {name: rate for name, rate in sorted(rates.items()) if rate > 0}
    if not positive:
        raise UserError(f"expected at least one positive rate in {where}, got none; set one in the config")
    return positive

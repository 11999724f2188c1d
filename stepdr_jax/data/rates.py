"""The mixture rates of a stage by step: its warm-up data, its mixture, and scheduled changes to it."""

from collections.abc import Mapping, Sequence

from stepdr_jax.errors import UserError

RateSchedule = list[tuple[int, dict[str, float]]]  # (first step, component -> rate above 0), ascending from step 0


def rate_schedule(
    mixture: Mapping[str, float],
    mixture_schedule: Sequence = (),
    warmup_data: tuple[str, int] = ("", 0),
    stage: str = "",
) -> RateSchedule:
    """Returns the rates of a stage by step.

    Args:
        mixture: component -> rate.
        mixture_schedule: (step, component -> rate) of changes from that step on; components not named keep their rate.
        warmup_data: a component that is read alone for the first n steps, and n.
        stage: the stage's name, for errors.

    Raises UserError for steps that do not ascend, warm-up data outside the mixture, negative rates and empty mixtures.
    """
    rates = {name: float(rate) for name, rate in mixture.items()}
    schedule = [(0, _positive_rates(rates, f"{stage}.mixture"))]
    where = f"{stage}.mixture_schedule"
    for entry in mixture_schedule:
        try:
            step, changes = entry
            step, rates = int(step), rates | {name: float(rate) for name, rate in dict(changes).items()}
        except (TypeError, ValueError):
            raise UserError(f"{where}: expected (step, dict(component=rate)), got {entry!r}") from None
        if step <= schedule[-1][0]:
            raise UserError(f"{where}: expected steps that ascend from 1, got {step} after {schedule[-1][0]}")
        schedule.append((step, _positive_rates(rates, f"{where} from step {step}")))
    component, steps = warmup_data
    if steps:
        if component not in schedule[0][1]:
            raise UserError(
                f"expected {stage}.warmup_data to be a component of its mixture ({', '.join(schedule[0][1])}), "
                f"got {component!r}"
            )
        rates_after = [rates for step, rates in schedule if step <= steps][-1]
        later = [(step, rates) for step, rates in schedule if step > steps]
        schedule = [(0, {component: 1.0}), (steps, rates_after), *later]
    return schedule


def stage_components(settings, stage: str = "") -> list[str]:
    """Returns the components that a stage reads at any step, sorted. `settings`: the stage's section of a config."""
    schedule = rate_schedule(settings.mixture, settings.mixture_schedule, stage=stage)
    return sorted({name for _, rates in schedule for name in rates})


def _positive_rates(rates: dict[str, float], where: str) -> dict[str, float]:
    if any(rate < 0 for rate in rates.values()):
        raise UserError(f"{where}: expected rates of at least 0, got {rates}")
    positive = {name: rate for name, rate in sorted(rates.items()) if rate > 0}
    if not positive:
        raise UserError(f"expected at least one positive rate in {where}, got none; set one in the config")
    return positive

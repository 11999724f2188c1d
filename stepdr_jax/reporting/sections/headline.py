"""The top of the report: the main result in words, tiles, and an overview by stage."""

from collections.abc import Mapping

from stepdr_jax.evaluation import results, statistics
from stepdr_jax.evaluation.statistics import Interval
from stepdr_jax.pages import plots
from stepdr_jax.pages.plots import Dot
from stepdr_jax.pages.wording import count_of, join_and
from stepdr_jax.progress import clock
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.sections.wording import Section, format_value
from stepdr_jax.runtime.stages import title_of


def result_sentences(run: Run, differences: Mapping[tuple[str, str], Mapping[str, statistics.Paired]]) -> Section:
    """The main result in words. `tone` is good only when PPO's interval over SFT lies above zero."""
    if not run.evaluated:
        return {"tone": "open", "sentences": ["Nothing has been evaluated yet, so there is no result."]}
    sentences, tone = [], "open"
    step = differences.get(("sft", "ppo"))
    if step:
        before = results.measure(run.evaluated["sft"], results.BY_NAME["reward"])
        after = results.measure(run.evaluated["ppo"], results.BY_NAME["reward"])
        gain = step["reward"].crossed
        seeds = len(step["reward"].per_seed)
        span = (
            f"{format_value(gain.mean, 'difference')}, 95\u00a0% interval {format_value(gain.low, 'difference')} to "
            f"{format_value(gain.high, 'difference')}, paired over {count_of(gain.clusters, 'held-out task')}"
            + (f" and {seeds} seeds" if seeds > 1 else "")
        )
        levels = f"from {format_value(before.mean)} after SFT to {format_value(after.mean)} after PPO"
        if gain.low > 0:
            tone = "good"
            sentences.append(f"PPO raised the mean held-out reward {levels} ({span}).")
        elif gain.high < 0:
            tone = "bad"
            sentences.append(f"PPO did not improve over SFT: it lowered the mean held-out reward {levels} ({span}).")
        else:
            tone = "flat"
            sentences.append(
                f"PPO did not measurably improve over SFT: the mean held-out reward went {levels}, and the interval of "
                f"the difference includes zero ({span})."
            )
        fixed = step["reward"].fixed_seeds
        if seeds > 1 and fixed.excludes_zero != gain.excludes_zero:
            sentences.append(
                f"For exactly these {seeds} training runs, resampling tasks only, the interval is "
                f"{format_value(fixed.low, 'difference')} to {format_value(fixed.high, 'difference')}: "
                + (
                    "the seeds differ too much to expect the same of another training run."
                    if fixed.excludes_zero
                    else "less certain."
                )
            )
    else:
        last = list(run.evaluated)[-1]
        reward = results.measure(run.evaluated[last], results.BY_NAME["reward"])
        sentences.append(
            f"The last evaluated stage is {title_of(last)}, with a mean held-out reward of {format_value(reward.mean)} "
            f"(95\u00a0% interval {format_value(reward.low)} to {format_value(reward.high)})."
        )
        missing = [title_of(stage) for stage in ("sft", "ppo") if stage not in run.evaluated]
        if missing:
            sentences.append(f"{join_and(missing)} {'has' if len(missing) == 1 else 'have'} not been evaluated yet.")
    step = differences.get(("midtrain2", "sft"))
    if step:
        gain = step["correct"].crossed
        before = results.measure(run.evaluated["midtrain2"], results.BY_NAME["correct"])
        after = results.measure(run.evaluated["sft"], results.BY_NAME["correct"])
        if gain.n:
            verb = "raised" if gain.low > 0 else "lowered" if gain.high < 0 else "did not measurably change"
            sentences.append(
                f"SFT {verb} the share of correct answers: {format_value(before.mean, 'share')} after mid-training, "
                f"{format_value(after.mean, 'share')} after SFT (95\u00a0% interval of the difference "
                f"{format_value(gain.low, 'difference')} to {format_value(gain.high, 'difference')})."
            )
    return {"tone": tone, "sentences": sentences}


def tiles(run: Run, summaries: Mapping[str, Mapping[str, Interval]], seconds: float | None) -> list[dict[str, str]]:
    out = []
    if summaries:
        last = list(summaries)[-1]
        reward, correct, cited = (summaries[last][name].mean for name in ("reward", "correct", "cited"))
        out += [
            {"value": format_value(reward), "label": f"mean held-out reward after {title_of(last)}"},
            {"value": format_value(correct, "share"), "label": f"correct after {title_of(last)}"},
            {"value": format_value(cited, "share"), "label": "with citations that all resolve"},
        ]
    if seconds:
        out.append(
            {
                "value": clock(seconds),
                "label": f"for all stages{f' of {len(run.seeds)} seeds' if len(run.seeds) > 1 else ''}",
            }
        )
    prepared = run.data.get("prepared")
    if prepared:
        out.append({"value": _compact(prepared["tokens"]), "label": "packed training tokens"})
    trajectories = run.data.get("trajectories")
    if trajectories:
        out.append({"value": f"{trajectories['kept']:,}", "label": "teacher trajectories kept"})
    return out


def _compact(n: float) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k" if n >= 1e4 else f"{n:,.0f}"


def overview(run: Run, summaries: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    if not summaries:
        return []
    out = []
    for name in ("reward", "correct"):
        metric = results.BY_NAME[name]
        rows = [(title_of(stage), stage_dots(run, stage, metric)) for stage in summaries]
        out.append(
            plots.dot_chart(
                rows,
                title=f"{metric.title} on held-out tasks",
                x_label="mean reward" if name == "reward" else "share of tasks with a known answer",
                x_range=(0, 1) if metric.unit == "share" else None,
                note=interval_note(run),
            )
        )
    return out


def interval_note(run: Run) -> str:
    seeds = len(run.seeds)
    return "Whiskers: 95\u00a0% interval." + (" Small dots: single seeds." if seeds > 1 else "")


def stage_dots(run: Run, stage: str, metric: results.Metric) -> list[Dot]:
    """The pooled value and, with several seeds, one small dot per seed."""
    rows = run.evaluated[stage]
    pooled = results.measure(rows, metric)
    dots = [Dot(pooled.mean, pooled.low, pooled.high)]
    seeds = sorted({row.seed for row in rows})
    if len(seeds) > 1:
        for seed in seeds:
            one = results.measure(
                [row for row in rows if row.seed == seed], metric, resamples=results.BREAKDOWN_RESAMPLES
            )
            dots.append(Dot(one.mean, one.low, one.high, f"seed {seed}", 6, small=True))
    return dots

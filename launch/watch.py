"""Shows how a run stands, in the terminal: live, or after the fact, from its metrics files alone.

Reads run_dir/seed<k>/<stage>/metrics.jsonl every second, so it works from any machine that sees the folder, on a run
that goes on, has ended or has died. Ctrl-C leaves; the run does not notice.
"""

import time

from absl import flags
from rich.console import Console
from rich.live import Live

from launch import entry
from stepdr_jax.errors import UserError
from stepdr_jax.reporting import dashboard, following
from stepdr_jax.runtime import stages

_RUN_DIR = flags.DEFINE_string("run_dir", "", "the run to watch, instead of config.run_dir")
_STAGE = flags.DEFINE_enum("stage", "", ["", *stages.with_metrics()], "the stage to show; default the one that runs")
_ONCE = flags.DEFINE_bool("once", False, "print one frame with all metrics and leave")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "between looks at the files", lower_bound=0.1)


def main(config) -> int:
    watched = following.FollowedRun(_RUN_DIR.value or config.run_dir)
    totals = {} if _RUN_DIR.value else {"ppo": config.ppo.iterations}
    console = Console()
    watched.poll()
    if _ONCE.value or not console.is_terminal:
        if not watched.layout.root.is_dir():
            raise UserError(f"{watched.layout.root} does not exist; name a run with --run_dir")
        console.print(dashboard.render_dashboard(watched, console, stage=_STAGE.value, totals=totals, whole=True))
        return 0
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(
                    dashboard.render_dashboard(watched, console, stage=_STAGE.value, totals=totals), refresh=True
                )
                time.sleep(_SECONDS.value)
                watched.poll()
    except KeyboardInterrupt:
        console.print(dashboard.render_dashboard(watched, console, stage=_STAGE.value, totals=totals))
    return 0


if __name__ == "__main__":
    entry.run(main, __doc__)

"""Writes the run report: run_dir/report.html (one file, opens offline) and run_dir/report.json (its numbers).

Works at any time: parts that do not exist yet name the command that makes them.
"""

import shlex

from launch import entry
from stepdr_jax.reporting import report


def main(config) -> None:
    print(report.write_report(config, shlex.join(entry.config_arguments())))


if __name__ == "__main__":
    entry.run(main, __doc__)

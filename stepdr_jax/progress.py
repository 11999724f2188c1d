"""Progress of a stage: an updated line on a terminal, a line every few seconds in a log, always with time left."""

import sys
import time


def clock(seconds: float) -> str:
    """Formats a duration as 12s, 3m04s or 1h02m."""
    seconds = int(max(seconds, 0))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """Counts work done and prints `stage  done/total unit  metrics  elapsed, left`.

    Args:
        stage: name of what is running.
        total: amount of work in `unit`.
        unit: what is counted ("steps", "episodes").
        start: work already done before this process (resume); excluded from the rate.
        every: seconds between lines when standard error is not a terminal.
    """

    def __init__(self, stage: str, total: int, unit: str = "steps", *, start: int = 0, every: float = 10.0):
        self.stage, self.total, self.unit, self.every = stage, total, unit, every
        self.done = self.start = start
        self.began = time.monotonic()
        self.printed = float("-inf")
        self.terminal = sys.stderr.isatty()

    def update(self, amount: int = 1, **metrics) -> None:
        """Adds `amount` of work; metrics are shown as name value pairs."""
        self.done += amount
        now = time.monotonic()
        if self.done < self.total and now - self.printed < (0.2 if self.terminal else self.every):
            return
        self.printed = now
        elapsed = now - self.began
        rate = (self.done - self.start) / elapsed if elapsed > 0 else 0.0
        left = clock((self.total - self.done) / rate) if rate else "?"
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        line = f"{self.stage}  {self.done}/{self.total} {self.unit}  {shown}  {clock(elapsed)} gone, {left} left"
        if self.terminal:
            sys.stderr.write("\r\x1b[K" + line + ("\n" if self.done >= self.total else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

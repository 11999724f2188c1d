"""Measuring a policy: held-out tasks, intervals, paired comparisons and cost."""

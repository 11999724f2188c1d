"""The embedded offline web: real facts, written as linked pages on a handful of hosts and served over HTTP."""

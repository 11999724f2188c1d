"""The offline web: real facts as linked pages on a handful of hosts, served over HTTP."""

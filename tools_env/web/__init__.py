"""Web access of the tools: egress policy, fetching, a forward proxy for the browser, and page parsing."""

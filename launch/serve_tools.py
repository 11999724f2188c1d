"""Serves the research tools over gRPC until stopped.

    python -m launch.serve_tools --world=runs/miniature/world --port=50061

`--help` lists every setting; a bearer token is read from $STEPDR_TOOLS_TOKEN.
"""

import sys

from tools_env import server

if __name__ == "__main__":
    sys.exit(server.main())

"""Run as a script inside the browser's sandbox, before the browser: opens the proxy's port there and passes the socket
out.

The sandbox has a network namespace without any route out. A socket belongs to the namespace that created it, whichever
process holds it: the host that receives this socket serves the only address that the browser can connect to.
"""

import os
import socket
import sys

CONTROL, PORT, *BROWSER = sys.argv[1:]

listening = socket.socket()
listening.bind(("127.0.0.1", int(PORT)))
listening.listen(256)
with socket.socket(socket.AF_UNIX) as host:
    host.connect(CONTROL)
    socket.send_fds(host, [b"port"], [listening.fileno()])
    host.recv(1)  # the host now serves the socket
listening.close()
os.execv(BROWSER[0], BROWSER)

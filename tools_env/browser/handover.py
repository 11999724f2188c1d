"""Run as a script inside the browser's sandbox, before the browser: opens the proxy's port there and hands it out.

The sandbox has a network of its own without a way out. A socket belongs to the network it was made in, whoever holds
it: the host that gets this one serves the only address that the browser can connect to.
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
    host.recv(1)  # the host serves it now
listening.close()
os.execv(BROWSER[0], BROWSER)

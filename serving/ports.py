"""Ports that several processes of ours listen on together, and that are kept for them.

The system gives each new connection to one of the processes that listen. A socket that is bound and
does not listen gets none; it keeps the port, for processes of the same user, while they come and
go.
"""

import socket


def hold_port(host: str, port: int) -> socket.socket:
    """Returns a socket that keeps a port until it is closed; port 0 takes any free one.

    Raises OSError if the address is not one of this machine, or somebody listens there already.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without SO_REUSEPORT this fails where others listen, whether they share the port or not.
    with socket.create_server((host, port), family=family) as alone:
        port = alone.getsockname()[1]
    held = socket.socket(family)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except BaseException:
        held.close()
        raise
    return held

"""Sockets to listen on."""

import errno
import socket
from contextlib import ExitStack
from typing import Any, Final

BACKLOG: Final = 2048  # as uvicorn's


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind a socket for each address family of a host; none of them listens yet.

    Raises:
        OSError: the address is not there or in use, or the name is not known.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses: list[tuple[int, Any]] = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    with ExitStack() as stack:
        sockets = [stack.enter_context(_bound(family, address)) for family, address in addresses]
        stack.pop_all()
    return sockets


def claim_port(host: str, first: int, count: int) -> list[socket.socket]:
    """Listen on the first port that is free of `count` ports from `first` on.

    Workers that start at once each get one of their own, and the successor of one that has ended gets that one's.

    Raises:
        OSError: none is free, or the address is not there.
    """
    for port in range(first, first + count):
        with ExitStack() as stack:
            try:
                sockets = [stack.enter_context(one) for one in bind(host, port)]
                for one in sockets:
                    one.listen(BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            stack.pop_all()
            return sockets
    ports = f"port {first} is" if count == 1 else f"the ports {first} to {first + count - 1} are"
    raise OSError(errno.EADDRINUSE, f"{ports} in use")


def _bound(family: int, address: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except BaseException:
        one.close()
        raise
    return one

"""Sockets that a process listens on, alone or with others."""

import socket
from contextlib import ExitStack
from typing import Any

from service.settings import Settings


def alone(settings: Settings) -> list[socket.socket]:
    """Bind sockets of their own to the address of the settings, one for each family.

    Raises:
        OSError: the address is not there or in use, or the name is not known.
    """
    found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses: list[tuple[int, Any]] = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    with ExitStack() as stack:
        sockets = [stack.enter_context(bound(family, address, shared=False)) for family, address in addresses]
        stack.pop_all()
    return sockets


def reserve(settings: Settings) -> list[socket.socket]:
    """Take the address of the settings for processes that share it, one socket for each family; none of them listens.

    They keep the port while a process ends and another takes its place.

    Raises:
        OSError: as `alone`.
    """
    # Alone first: with SO_REUSEPORT, a second service on the same port would share its connections unnoticed.
    with ExitStack() as stack:
        addresses = [(one.family, stack.enter_context(one).getsockname()) for one in alone(settings)]
    return [bound(family, address, shared=True) for family, address in addresses]


def bound(family: int, address: Any, *, shared: bool) -> socket.socket:
    """Return a socket of its own on an address."""
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shared:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(address)
    except BaseException:
        one.close()
        raise
    return one

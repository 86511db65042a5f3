"""How a process that speaks HTTP is started."""

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from service.ledger import Ledger
from service.settings import without_settings
from service.sockets import bound


async def spawn(
    link: socket.socket, ledger: Ledger, row: int, addresses: Sequence[socket.socket], settings: bytes
) -> asyncio.subprocess.Process:
    """Start a process.

    Args:
        link: its end of the link.
        ledger: what is in the house.
        row: its row there.
        addresses: sockets bound to where it is to listen.
        settings: what it reads from standard input.

    Raises:
        OSError: it could not be started.
    """
    with ExitStack() as stack:
        # Only that process keeps them: the connections of one that has ended go to the others.
        sockets = [stack.enter_context(bound(one.family, one.getsockname(), shared=True)) for one in addresses]
        # Not a pipe: where the process ends before it is written to, uvloop raises RuntimeError.
        memory = stack.enter_context(os.fdopen(os.memfd_create("settings"), "wb+", buffering=0))
        memory.write(settings)
        memory.seek(0)
        descriptors = [link.fileno(), ledger.descriptor, *(one.fileno() for one in sockets)]
        numbers = [descriptors[0], descriptors[1], ledger.rows, row, *descriptors[2:]]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.front_main",
            *map(str, numbers),
            stdin=memory,
            pass_fds=descriptors,
            env=without_settings(os.environ),
            # What a terminal or a shell sends to the group of this process is answered here, by a drain. To have the
            # signals ignored from the start would not do: libuv sets them back for what it starts.
            start_new_session=True,
        )

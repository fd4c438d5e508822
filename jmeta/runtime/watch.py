"""Whether the other processes live: each holds a connection to the first, which its death closes.

JAX finds a silent process by its heartbeat; the system knows of a dead one at once.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

_KEY = "jmeta/watch"
_HELLO = 5.0  # seconds for a connection to be made and named
_BYE = b"."


@contextlib.contextmanager
def watched(
    client: Any, process: int, processes: int, host: str | None, gone: Callable[[int], None]
) -> Iterator[None]:
    """In this block the death of a process is told to all others, through the first.

    Only an end that the system reports counts: a connection that breaks, or was never made because
    of a firewall, leaves the matter to the heartbeat.

    Args:
        client: of JAX's coordination service, by which the others learn where to connect.
        process: this one.
        processes: how many there are.
        host: a name of the first process's machine, beside those that it finds itself.
        gone: called in another thread, once, with the process that died.
    """
    links: list[socket.socket] = []
    with contextlib.suppress(Exception):  # it is a convenience: nothing may end for want of it
        if process == 0:
            target, server, token = _first, socket.create_server(("", 0)), secrets.token_hex(16)
            hosts = [name for name in (host, _address(), socket.gethostname()) if name]
            said = {"hosts": hosts, "port": server.getsockname()[1], "token": token}
            client.key_value_set(_KEY, json.dumps(said), allow_overwrite=True)
            links.append(server)
            arguments: tuple[Any, ...] = (server, token, processes, links, gone)
        else:
            said = json.loads(client.blocking_key_value_get(_KEY, int(1000 * _HELLO)))
            link = _connected(said["hosts"], said["port"])
            link.sendall(f"{said['token']} {process}\n".encode())
            links.append(link)
            target, arguments = _other, (link, gone)
        threading.Thread(target=target, args=arguments, daemon=True).start()
    try:
        yield
    finally:
        for link in reversed(links):  # the first process's listener last
            with contextlib.suppress(OSError):
                link.sendall(_BYE)


def _first(
    server: socket.socket,
    token: str,
    processes: int,
    links: list[socket.socket],
    gone: Callable[[int], None],
) -> None:
    """Wait for the end of each connection; pass on which process it was."""
    named: dict[socket.socket, int] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(server, selectors.EVENT_READ)
        while True:
            for found, _ in ready.select():
                if found.fileobj is server:
                    link, _ = server.accept()
                    process = _named(link, token, processes)
                    if process is None:
                        link.close()
                        continue
                    named[link] = process
                    links.append(link)
                    ready.register(link, selectors.EVENT_READ)
                    continue
                link = next(each for each in named if each is found.fileobj)
                ready.unregister(link)
                if _ended(link) == b"":
                    for other in named:
                        with contextlib.suppress(OSError):
                            other.sendall(f"{named[link]}\n".encode())
                    gone(named[link])
                    return


def _other(link: socket.socket, gone: Callable[[int], None]) -> None:
    """Wait for the end of the connection to the first process, or for what it says."""
    said = _ended(link)
    if said != _BYE:
        gone(int(said or 0))


def _ended(link: socket.socket) -> bytes:
    """What a connection says at its end: nothing, if the system closed it for a dead process."""
    try:
        return link.recv(16).strip()
    except OSError:
        return _BYE


def _named(link: socket.socket, token: str, processes: int) -> int | None:
    """The process at the other end; None if it is not one of ours."""
    link.settimeout(_HELLO)
    try:
        said, _, process = link.recv(64).decode().strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        return None
    link.settimeout(None)
    _keep(link)
    known = secrets.compare_digest(said, token) and process.isdecimal()
    return int(process) if known and 0 < int(process) < processes else None


def _connected(hosts: list[str], port: int) -> socket.socket:
    """A connection to the first of these names that answers."""
    failure: OSError | None = None
    for host in hosts:
        try:
            link = socket.create_connection((host, port), _HELLO)
        except OSError as error:
            failure = error
            continue
        link.settimeout(None)
        _keep(link)
        return link
    raise failure or OSError("no host was named")


def _keep(link: socket.socket) -> None:
    """Say something now and then, so that no firewall forgets the connection."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)


def _address() -> str | None:
    """This machine's address on its network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return None
        return probe.getsockname()[0]

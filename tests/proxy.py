"""A TCP proxy that fails as networks do: it delays, swallows, cuts and half-closes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from time import sleep

READY = b"Z\x00\x00\x00\x05I"
"""What a PostgreSQL server ends a log-in with."""


class Proxy:
    """Passes bytes between clients and a server, each connection on threads of its own."""

    def __init__(self, address, port=0):
        """Listen, and connect to an address: a path of a Unix socket, or a host and port."""
        self.address = address
        self.delay = 0.0
        """Seconds that each packet takes, in both directions."""
        self.swallows = False
        """Packets get lost, and nobody is told."""
        self.refuses = False
        """New connections are closed at once."""
        self.is_silent = False
        """Nothing that a PostgreSQL server says to who has logged in arrives."""
        self._pairs = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """Reset all connections, in the middle of whatever they say."""
        for pair in self._take():
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def half_close(self):
        """End the server's side of all connections; what clients say is still taken."""
        for client, _ in list(self._pairs):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_WR)

    def close(self):
        """Listen no more, and end all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _take(self):
        pairs, self._pairs = self._pairs, []
        return pairs

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _connect(self):
        if self.refuses:
            raise ConnectionRefusedError
        if isinstance(self.address, tuple):
            return socket.create_connection(self.address, 5)
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(self.address))
        return server

    def _pump(self, source, sink):
        is_in = False
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if self.delay:
                    sleep(self.delay)
                if not self.swallows and not (self.is_silent and is_in):
                    sink.sendall(data)
                is_in = is_in or data.endswith(READY)
            sink.shutdown(socket.SHUT_WR)

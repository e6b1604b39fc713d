"""The process of a `workers.Worker`, run as a script with the file descriptor of its connection."""

import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection


def main() -> None:
    """Do what comes through the connection, one after the other; send how far it is, and then the result."""
    connection, inbox = Connection(int(sys.argv[1])), queue.SimpleQueue[bytes]()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    while True:
        # Unpickled here: what it imports may want to be imported by the main thread.
        work, cell = pickle.loads(inbox.get())
        connection.send(work(cell, connection.send))


def _read(connection: Connection, inbox: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        # The parent is gone, however it went: nothing that was started here may go on writing.
        os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()

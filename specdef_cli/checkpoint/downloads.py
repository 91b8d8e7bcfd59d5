"""Files that arrive in the background, in the order in which they will be needed.

A download is stopped through its progress bar: huggingface_hub tells the bar of every piece that has arrived, and a bar
that raises ends the download as an error of the network would, temporary file included. A thread blocked on the network
is abandoned; threads are daemons and do not keep the process alive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from huggingface_hub.utils import tqdm

from specdef_cli.waiting import first_completed

# How long a stopped download may take to remove its temporary file.
GRACE_SECONDS = 3.0

Fetch = Callable[[str, type[tqdm]], object]
"""Download the file of this name, and show it with this kind of bar."""


class Downloads:
    """Downloads in a few threads, which start when a file is first waited for.

    Args:
        names: What to download, in the order in which it will be needed.
        on_bytes: Told how many bytes have arrived since the last time, from any thread; ``None`` shows
            huggingface_hub's bars instead.
    """

    def __init__(
        self, names: Sequence[str], fetch: Fetch, workers: int, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        self._fetch = fetch
        self._workers = workers
        self._queue = deque(names)
        self._arrivals: dict[str, Future[None]] = {name: Future() for name in names}
        self._stopped = threading.Event()
        self._bar = _stoppable_bar(self._stopped, on_bytes)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def wait(self, name: str) -> None:
        """Return once ``name`` is there. Names that are not in the queue are taken to be present already.

        A file that is waited for is the next to be downloaded, if its turn has not come yet.

        Raises:
            Exception: What ended the downloads, this one or another.
            CancelledError: They were stopped.
        """
        arrival = self._arrivals.get(name)
        if arrival is None:
            return
        if not arrival.done():
            self._prefer(name)
            first_completed({arrival})
        arrival.result()

    def wait_for_all(self) -> None:
        """Return once every file is there.

        Raises:
            Exception: As :meth:`wait`.
        """
        for name in self._arrivals:
            self.wait(name)

    def stop(self) -> None:
        """Start no more downloads, end the running ones at their next piece, and wake up the threads that wait."""
        self._end(CancelledError())

    def close(self) -> None:
        """Stop, and give the running downloads a moment to clean up."""
        self.stop()
        until = time.monotonic() + GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _prefer(self, name: str) -> None:
        with self._lock:
            if name in self._queue:
                self._queue.remove(name)
                self._queue.appendleft(name)
            if not self._threads and not self._stopped.is_set():
                self._threads = [
                    threading.Thread(target=self._work, name="specdef-download", daemon=True)
                    for _ in range(min(self._workers, len(self._queue)))
                ]
                for thread in self._threads:
                    thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    return
                name = self._queue.popleft()
            try:
                self._fetch(name, self._bar)
            except BaseException as error:
                self._end(error)
                return
            with self._lock:
                if not self._arrivals[name].done():
                    self._arrivals[name].set_result(None)

    def _end(self, reason: BaseException) -> None:
        with self._lock:
            self._stopped.set()
            self._queue.clear()
            for arrival in self._arrivals.values():
                if not arrival.done():
                    arrival.set_exception(reason)


def _stoppable_bar(stopped: threading.Event, on_bytes: Callable[[int], None] | None) -> type[tqdm]:
    class StoppableBar(tqdm):
        """huggingface_hub's own bar, seen or not, until it is stopped."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            # Xet has a second bar, for what came over the network before it was put together.
            self.counts = not str(options.get("name")).endswith(".transfer")
            super().__init__(*arguments, **(options if on_bytes is None else {**options, "disable": True}))

        def update(self, n: float | None = 1) -> Any:
            if stopped.is_set():
                raise CancelledError
            if on_bytes is not None and self.counts:
                on_bytes(int(n or 0))
            return super().update(n)

    return StoppableBar

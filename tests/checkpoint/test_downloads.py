"""Background downloads: in order, on demand, and over at once when they are stopped or one of them fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from huggingface_hub.utils import tqdm

from specdef_cli.checkpoint.downloads import Downloads

WORKERS = 3
NAMES = [f"{number}" for number in range(WORKERS + 4)]
FIRST, LAST = NAMES[0], NAMES[-1]
PATIENCE = 30.0


class Network:
    """Fetches that end when they are told to, and a record of what was begun."""

    def __init__(self) -> None:
        self.begun: queue.Queue[str] = queue.Queue()
        self.end = {name: threading.Event() for name in NAMES}
        self.errors: dict[str, Exception] = {}

    def fetch(self, name: str, bar: type[tqdm]) -> None:
        self.begun.put(name)
        with bar(disable=True) as progress:
            while not self.end[name].wait(0.01):
                progress.update(0)  # a piece has arrived
        if name in self.errors:
            raise self.errors[name]

    def next(self, count: int) -> list[str]:
        """The names of the next downloads to begin."""
        return [self.begun.get(timeout=PATIENCE) for _ in range(count)]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def waiting() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_nothing_begins_before_something_is_awaited(network: Network, waiting: ThreadPoolExecutor) -> None:
    downloads = Downloads(NAMES, network.fetch, WORKERS)
    downloads.wait("a file that was there before")
    assert network.begun.empty()
    arrival = waiting.submit(downloads.wait, FIRST)
    assert set(network.next(WORKERS)) == set(NAMES[:WORKERS])
    assert not arrival.done()
    network.end[FIRST].set()
    arrival.result(PATIENCE)  # though no other has arrived
    assert network.next(1) == [NAMES[WORKERS]]
    for end in network.end.values():
        end.set()
    downloads.wait_for_all()
    assert set(network.next(3)) == set(NAMES[WORKERS + 1 :])


def test_what_is_awaited_is_next(network: Network, waiting: ThreadPoolExecutor) -> None:
    downloads = Downloads(NAMES, network.fetch, WORKERS)
    waiting.submit(downloads.wait, FIRST)
    network.next(WORKERS)
    arrival = waiting.submit(downloads.wait, LAST)
    while downloads._queue[0] != LAST:
        threading.Event().wait(0.01)
    network.end[NAMES[1]].set()
    assert network.next(1) == [LAST]
    for end in network.end.values():
        end.set()
    arrival.result(PATIENCE)
    downloads.wait_for_all()


def test_stopped_downloads_end_at_their_next_piece(network: Network, waiting: ThreadPoolExecutor) -> None:
    downloads = Downloads(NAMES, network.fetch, WORKERS)
    arrivals = [waiting.submit(downloads.wait, name) for name in (FIRST, LAST)]
    network.next(WORKERS)
    downloads.stop()
    for arrival in arrivals:
        with pytest.raises(CancelledError):
            arrival.result(PATIENCE)
    downloads.close()
    assert not any(thread.is_alive() for thread in downloads._threads)
    assert network.begun.empty()
    with pytest.raises(CancelledError):
        downloads.wait(LAST)


def test_one_failure_ends_all(network: Network, waiting: ThreadPoolExecutor) -> None:
    network.errors["1"] = OSError("no route")
    downloads = Downloads(NAMES, network.fetch, WORKERS)
    arrivals = [waiting.submit(downloads.wait, name) for name in (FIRST, LAST)]
    network.next(WORKERS)
    network.end["1"].set()
    for arrival in arrivals:
        with pytest.raises(OSError, match="no route"):
            arrival.result(PATIENCE)
    for thread in downloads._threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in downloads._threads)
    assert network.begun.empty()


def test_a_file_that_has_arrived_stays_so(network: Network) -> None:
    network.end[FIRST].set()
    downloads = Downloads(NAMES, network.fetch, WORKERS)
    downloads.wait(FIRST)
    downloads.close()
    downloads.wait(FIRST)

"""How much memory images may take while they are decoded, all threads together."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 2 * 2**30  # bytes; a small file can claim 100 million pixels, 1.5e9 bytes
BYTES_PER_PIXEL = 15  # at most, measured: what a file holds, its conversion to RGB, the array


class Room:
    """A bound on the bytes that threads hold.

    A thread waits where its image would not fit beside those of the others. So one image
    that is larger than the bound is decoded alone, and what is decoded depends on nobody's
    turn.
    """

    def __init__(self, most: int = MOST):
        self.most = most
        self.held = 0  # bytes, by all threads
        self._changed = threading.Condition()
        self._own = threading.local()

    @contextmanager
    def one_image(self) -> Iterator[None]:
        """What this thread takes within is given back at the end."""
        self._own.held = 0
        try:
            yield
        finally:
            with self._changed:
                self.held -= self._own.held
                self._changed.notify_all()
            del self._own.held

    def take(self, pixels: int) -> None:
        """Waits until there is room for an image. Outside of `one_image` nothing is counted,
        for nobody would give it back.

        A thread that holds something goes on at once: two could wait for each other.
        """
        own = self._own
        if not hasattr(own, "held"):
            return
        size = pixels * BYTES_PER_PIXEL
        with self._changed:
            self._changed.wait_for(
                lambda: own.held or not self.held or self.held + size <= self.most
            )
            self.held += size
            own.held += size


ROOM = Room()  # of this process

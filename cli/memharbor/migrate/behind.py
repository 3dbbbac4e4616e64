"""Do work behind the caller, a few pieces at once and each finished in its turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

# Called by a piece of work before what must not overtake the piece before it; raises what that one raised.
Turn = Callable[[], object]


class Behind:
    """
    So many pieces of work at once. What one raised is raised by a later call, or at the end.

    Args:
        lanes: How many; piece number n may use what belongs to lane n modulo that, for no other piece does meanwhile.

    >>> done = []
    >>> with Behind(2) as behind:
    ...     for number in range(3):
    ...         behind.do(lambda turn, number=number: (turn(), done.append(number)))
    >>> done
    [0, 1, 2]
    """

    def __init__(self, lanes: int) -> None:
        self._executor = ThreadPoolExecutor(max_workers=lanes)
        self._lanes = lanes
        self._under_way: deque[Future[object]] = deque()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is under way."""
        self._executor.shutdown()
        if kind is None:
            for work in self._under_way:
                work.result()

    def do(self, work: Callable[[Turn], object]) -> None:
        """Begin a piece of work, once there is a lane for it."""
        while len(self._under_way) >= self._lanes:
            self._under_way.popleft().result()
        turn = self._under_way[-1].result if self._under_way else lambda: None
        self._under_way.append(self._executor.submit(work, turn))

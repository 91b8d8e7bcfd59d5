"""Collections that leave older objects alone still free what is garbage."""

from __future__ import annotations

import gc
import weakref

from specdef_cli.model.loading import new_objects_only


class _Circle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.self = self


def _dropped() -> weakref.ref[_Circle]:
    circle = _Circle()
    return weakref.ref(circle)


def test_garbage_from_inside_is_freed() -> None:
    with new_objects_only():
        inside = _dropped()
        gc.collect()
        assert inside() is None


def test_older_objects_are_not_walked_through_and_are_collected_again_afterwards() -> None:
    circle = _Circle()
    older = weakref.ref(circle)
    with new_objects_only():
        assert any(found is circle for found in gc.get_objects()) is False
        del circle
        gc.collect()
        assert older() is not None
    gc.collect()
    assert older() is None

"""Pickles that somebody else may have written: nothing of this process is changed by them."""

import pickle
from typing import ClassVar


class Unpickler(pickle._Unpickler):
    """Reads a pickle of plain data; a subclass says by `find_class` what may be named in it.

    A pickle may set attributes (BUILD), of a class or function that it was given too, which would be changed for the
    whole process: here only those of objects of the types `built`, which a pickle makes for itself. In Python, where
    an instruction can be taken over; the index of 300 tensors takes 18 ms so, and 2 ms in C.
    """

    built: ClassVar[tuple[type, ...]] = ()

    def _build(self) -> None:
        target = self.stack[-2]  # type: ignore[attr-defined]
        if type(target) not in self.built:
            raise pickle.UnpicklingError(f"it changes {target!r:.60}, which it has not made")
        self.load_build()  # type: ignore[attr-defined]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}  # type: ignore[dict-item]

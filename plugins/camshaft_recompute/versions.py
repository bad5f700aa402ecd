"""Whether a saved tensor was written in place since: autograd itself does not look where hooks pack what it saves."""

from __future__ import annotations

from torch import Tensor


class Version:
    """What ``tensor`` was when autograd saved it.

    All views of a tensor share one counter, which every write in place raises and autograd itself goes by. What is
    written through ``.data`` is noticed by neither.
    """

    __slots__ = ("_counter", "_number", "_what")

    def __init__(self, tensor: Tensor) -> None:
        self._counter, self._number = tensor, tensor._version
        self._what = f"{tensor.type()} {list(tensor.shape)}"

    def let_go(self) -> Version:
        """Keep the counter, and none of the tensor's memory."""
        counter = self._counter.detach()  # shares the counter, also when its memory is exchanged
        counter.data = counter.new_empty(0)
        self._counter = counter
        return self

    @property
    def current(self) -> bool:
        """Whether nobody has written since."""
        return self._counter._version == self._number

    def check(self, module: str) -> None:
        """Refuse what is not what it was. ``module``: where it was saved.

        Raises:
            RuntimeError: as autograd raises without hooks.
        """
        if not self.current:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self._what}], which module '{module}' saved, is at version {self._counter._version}; expected "
                f"version {self._number} instead. That is so without plugins.recompute, too"
            )

"""The first of two processes, without starting another: what they say to one another."""

from typing import Any

from torch import Tensor

from ternarize.ranks import World


class Told(World):
    """The first of two processes; the second says what it is given."""

    def __init__(self, said: Any) -> None:
        super().__init__(0, 2)
        self.said = said

    def all(self, value: Any, kind: str = "words") -> list[Any]:
        return [value, self.said]

    def gather(self, tensor: Tensor, kind: str) -> list[Tensor]:
        return self.all(tensor, kind)

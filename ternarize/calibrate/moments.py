"""What calibration sums up for a matrix: its inputs, and the targets of its products.

With x the input of a matrix and y what its product is to be (tracing.py says which):

    H = sum x x^T,  Y = sum y x^T
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

SORTED = 1 << 22  # elements that are sorted at a time


@dataclass
class Inputs:
    """Sums over the tokens that go into one matrix, or into several that share their input.

    hessian  (cols, cols) float32  sum x x^T; None where the tokens themselves are kept
    kept     (n, cols) float32 each: the tokens, where they are fewer than columns
    total    (cols,) float64  sum x
    tokens   how many
    order    of the Hessian's rows and columns after `sort`, smallest diagonal element first
    centred  whether the Hessian has been taken about the mean since (metric.py)
    """

    hessian: Tensor | None
    total: Tensor
    kept: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    order: Tensor | None = None
    centred: bool = False

    @classmethod
    def empty(
        cls, cols: int, *, keep: bool = False, device: torch.device | str = "cpu"
    ) -> "Inputs":
        """No tokens yet. `keep`: have the tokens instead of a Hessian while they are smaller."""
        hessian = None if keep else torch.zeros(cols, cols, device=device)
        return cls(hessian, torch.zeros(cols, dtype=torch.float64, device=device))

    def add(self, x: Tensor) -> None:
        """Add tokens (n, cols) float32."""
        self.total += x.sum(0, dtype=torch.float64)
        self.tokens += len(x)
        self.kept.append(x)
        if self.hessian is None and self.tokens <= len(self.total):
            return
        if self.hessian is None:
            self.hessian = x.new_zeros(len(self.total), len(self.total))
        for some in self.kept:
            self.hessian.addmm_(some.T, some)
        self.kept.clear()

    def fold(self, other: "Inputs") -> None:
        """Add the sums over other tokens; both have a Hessian."""
        assert self.hessian is not None and other.hessian is not None
        self.hessian += other.hessian
        self.total += other.total
        self.tokens += other.tokens

    def product(self, matrix: Tensor) -> Tensor:
        """sum (W x) x^T for W (rows, cols) float32; not after `sort`."""
        assert self.order is None
        result = torch.zeros_like(matrix) if self.hessian is None else matrix @ self.hessian
        for x in self.kept:
            result += (matrix @ x.T) @ x
        return result

    def energy(self, matrix: Tensor) -> float:
        """sum |W x|^2 for W (rows, cols) float32; not after `sort`."""
        assert self.order is None
        parts = [(matrix @ x.T).square() for x in self.kept]
        if self.hessian is not None:
            parts.append((matrix @ self.hessian) * matrix)
        return sum(float(part.sum(dtype=torch.float64)) for part in parts)

    def sort(self) -> Tensor:
        """Put the Hessian, in place, into the order of its diagonal; returns the order (cols,).

        It is made symmetric to the last bit, so that it is the same for the first matrix that is
        solved with it as for later ones.
        """
        assert self.hessian is not None
        if self.order is None:
            self.order = self.hessian.diagonal().argsort(stable=True)
            step = max(1, SORTED // len(self.order))
            for lines in (self.hessian, self.hessian.T):
                for first in range(0, len(lines), step):
                    some = lines[first : first + step]
                    some.copy_(some.index_select(1, self.order))
            for first in range(0, len(self.order), step):
                some = self.hessian[first : first + step]
                corner = some[:, first : first + step]
                corner.copy_(corner.triu() + corner.triu(1).T)
                some[:, :first] = self.hessian[:first, first : first + step].T
        return self.order


@dataclass
class Moments:
    """Sums over tokens for one matrix.

    inputs    what goes in; may be shared
    target    (rows, cols) float32  sum y x^T; None where the target is the matrix's own product
    total     (rows,) float64  sum y
    energy    sum |y|^2
    """

    inputs: Inputs
    target: Tensor | None
    total: Tensor
    energy: float = 0.0

    @classmethod
    def empty(cls, inputs: Inputs, rows: int, *, target: bool) -> "Moments":
        """No targets yet."""
        total = torch.zeros(rows, dtype=torch.float64, device=inputs.total.device)
        size = rows, len(inputs.total)
        return cls(inputs, torch.zeros(size, device=total.device) if target else None, total)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the targets y (tokens, rows) of x (tokens, cols), float32; x is for `inputs.add`."""
        assert self.target is not None
        self.target.addmm_(y.T, x)
        self.total += y.sum(0, dtype=torch.float64)
        self.energy += float(y.square().sum(dtype=torch.float64))

    def fold(self, other: "Moments") -> None:
        """Add the sums over other tokens, but for those of the inputs."""
        assert self.target is not None and other.target is not None
        self.target += other.target
        self.total += other.total
        self.energy += other.energy

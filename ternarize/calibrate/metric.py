"""The metric in which a matrix is approximated: H + ridge I, or its Cholesky factor.

Of (cols, cols) matrices there is one, in which the two take turns below the diagonal, beside what
is known of held-out tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ternarize.calibrate.moments import Inputs

PANEL = 256  # columns of the factor that are computed at a time
AT_A_TIME = 1 << 22  # weights that are worked on


class Metric:
    """M = H + ridge I or its Cholesky factor L, in the memory of a Hessian.

    Columns are in the order of H's diagonal, the smallest element first. The matrix is made of
    square panels: those above the diagonal are always H's, those below it are H's or L's, and
    those on it are M's or L's.

    matrix   (cols, cols) float32
    order    (cols,) int64: sorted column -> column of the weight; back: the other way
    unit     mean H_jj
    ridge    as it is now: lambda or a damping

    As a context it gives the Hessian back as it was, but sorted, and about the mean if that was
    asked for: another matrix with the same inputs, which asks for the same, finds the same bits.
    """

    def __init__(self, inputs: Inputs, *, centred: bool) -> None:
        """centred: take the moments about the mean."""
        self.order = inputs.sort()
        self.back = self.order.argsort()
        assert inputs.hessian is not None
        self.matrix = inputs.hessian
        if centred != inputs.centred:
            mean = (inputs.total / inputs.tokens**0.5)[self.order].float()
            self.matrix.addr_(mean, mean, alpha=-1 if centred else 1)
            inputs.centred = centred
        self.diagonal = self.matrix.diagonal().clone()
        self.unit = float(self.diagonal.mean())
        self.ridge = 0.0
        cols = len(self.matrix)
        self.spans = [slice(a, min(a + PANEL, cols)) for a in range(0, cols, PANEL)]
        self.corners = [self.matrix[span, span].clone() for span in self.spans]
        self.whole, self.valid = True, False  # below the diagonal is H; is L

    def __enter__(self) -> "Metric":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore(0.0)

    def restore(self, ridge: float) -> None:
        """Have M in all of the matrix. ridge: in units of the mean H_jj."""
        if not self.whole:
            for span, corner in zip(self.spans, self.corners, strict=True):
                self.matrix[span, span] = corner
                self.matrix[span.stop :, span] = self.matrix[span, span.stop :].T
            self.whole = True
        self.ridge = ridge * self.unit
        self.matrix.diagonal().copy_(self.diagonal + self.ridge)

    def factorize(self, ridge: float) -> bool:
        """Have L in the lower triangle; False, and nothing of use there, if rounding forbids."""
        if not self.whole and self.ridge == ridge * self.unit:
            return self.valid
        self.restore(ridge)
        self.whole = self.valid = False
        for span in self.spans:
            done = slice(0, span.start)
            below = slice(span.stop, None)
            column = self.matrix[span.start :, span]
            column.addmm_(self.matrix[span.start :, done], self.matrix[span, done].T, alpha=-1)
            corner, failed = torch.linalg.cholesky_ex(self.matrix[span, span])
            if int(failed):
                return False
            self.matrix[span, span] = corner
            self.matrix[below, span] = torch.linalg.solve_triangular(
                corner.T, self.matrix[below, span], upper=True, left=False
            )
        self.valid = True
        return True

    def divide(self, aim: Tensor) -> Tensor:
        """M^-1 aim for (cols, n), after `factorize`."""
        half = torch.linalg.solve_triangular(self.matrix, aim, upper=False)
        result: Tensor = torch.linalg.solve_triangular(self.matrix.T, half, upper=True)
        return result

    def times(self, values: Tensor) -> Tensor:
        """Values M for (n, cols) as stored; not while the matrix holds L."""
        product = values.index_select(1, self.order) @ self.matrix
        return product.index_select(1, self.back)

    def sorted(self, values: Tensor) -> Tensor:
        """(n, cols) -> (cols, n), so that each column lies together in memory, sorted."""
        return values.T.contiguous().index_select(0, self.order)


def chunks(matrix: Tensor, step: int = 0) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    count, step = len(matrix), step or max(1, AT_A_TIME // matrix.shape[1])
    return (slice(first, min(first + step, count)) for first in range(0, count, step))

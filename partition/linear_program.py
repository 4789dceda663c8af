"""Small dense linear programmes through HiGHS: one thread, no clock, equal input, equal output."""

from __future__ import annotations

import highspy
import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError

Floats = NDArray[np.float64]

_TOLERANCE = 1e-10  # the least HiGHS takes; rows are scaled to about 1 by the callers


def minimise(costs: Floats, rows: Floats, most: Floats, upper: Floats) -> Floats | None:
    """Minimise costs @ x under rows @ x <= most and 0 <= x <= upper.

    Args:
        costs: (n,).
        rows: (m, n).
        most: (m,).
        upper: (n,), may be infinite.

    Returns:
        (n,), or None where nothing satisfies the rows.

    Raises:
        BackendError: HiGHS ended in any other way; nothing is known then.
    """
    n_rows, n_columns = rows.shape
    programme = highspy.HighsLp()
    programme.num_col_, programme.num_row_ = n_columns, n_rows
    programme.col_cost_ = costs
    programme.col_lower_ = np.zeros(n_columns)
    programme.col_upper_ = upper
    programme.row_lower_ = np.full(n_rows, -highspy.kHighsInf)
    programme.row_upper_ = most
    matrix = programme.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.start_ = np.arange(n_rows + 1, dtype=np.int32) * n_columns
    matrix.index_ = np.tile(np.arange(n_columns, dtype=np.int32), n_rows)
    matrix.value_ = rows.ravel()
    solver = _solver()
    solver.passModel(programme)
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        raise BackendError(
            f"HiGHS ended a linear programme of {n_rows} rows and {n_columns} columns with "
            f"{solver.modelStatusToString(status)!r}, wanted an optimum or a proof that none exists"
        )
    found: Floats = np.array(solver.getSolution().col_value)
    return np.clip(found, 0.0, upper)


def _solver() -> highspy.Highs:
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    for name, value in (
        ("output_flag", False),
        ("threads", 1),
        ("presolve", "off"),
        ("solver", "simplex"),
        ("primal_feasibility_tolerance", _TOLERANCE),
        ("dual_feasibility_tolerance", _TOLERANCE),
    ):
        solver.setOptionValue(name, value)
    return solver

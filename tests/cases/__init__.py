"""The tables of optimizers under test, a file for each sharding class. A new optimizer is a row in each of two lists:

- ``CASES``: settings under which every layout must give what one process gives (``tests/test_conformance.py``);
- ``ORACLES``: settings in which it must equal another library, or its formula in ``tests/formulas/``
  (``tests/test_parity.py``).
"""

from tests.cases import (
    adam_like,
    curvature,
    elementwise,
    matrices,
    momentum,
    norms,
    rows,
    schedules,
    whole_model,
    wrappers,
)

_TABLES = (elementwise, adam_like, momentum, norms, rows, whole_model, schedules, curvature, matrices, wrappers)
CASES = [case for table in _TABLES for case in table.CASES]
ORACLES = [oracle for table in _TABLES for oracle in table.ORACLES]

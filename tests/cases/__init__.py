"""The tables of optimizers under test, a file for each sharding class. A new optimizer is a row in each of two lists:

- ``CASES``: settings under which every layout must give what one process gives (``tests/test_conformance.py``);
- ``ORACLES``: settings in which it must equal another library, or its formula in ``tests/formulas/``
  (``tests/test_parity.py``).
"""

from tests.cases import elementwise, norms, rows, whole_model

CASES = [*elementwise.CASES, *norms.CASES, *rows.CASES, *whole_model.CASES]
ORACLES = [*elementwise.ORACLES, *norms.ORACLES, *rows.ORACLES, *whole_model.ORACLES]

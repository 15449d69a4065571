"""The report of a run: `report.json`, figures, and one self-contained HTML page.

`report.json` is the single source: the page shows what is in it, the rows of `metrics.jsonl`
and the image grids, and nothing else. Needs neither JAX nor a display.
"""

from jax_unlearn.app.report.figures import Grid
from jax_unlearn.app.report.folder import read_rows, write_comparison, write_report
from jax_unlearn.app.report.page import verdict

__all__ = ["Grid", "read_rows", "verdict", "write_comparison", "write_report"]

"""What is done to rows before a kernel or a feature map sees them: fitted on training rows, streamed over blocks.

`rows.py` treats one row at a time, `statistics.py` has the sums over rows, `steps.py` the steps, `fitted.py` the chain
that a job stores with its model. Pure numerics; the execution layer decides which rows are read when.
"""

from ntkdask.preprocessing.fitted import FittedPreprocessor, fit_in_memory
from ntkdask.preprocessing.rows import check_finite_rows
from ntkdask.preprocessing.statistics import Moments, SecondMoments
from ntkdask.preprocessing.steps import ZCA, Center, Standardize, State, Statistics, Step, UnitNorm, parse_steps

__all__ = [
    "ZCA",
    "Center",
    "FittedPreprocessor",
    "Moments",
    "SecondMoments",
    "Standardize",
    "State",
    "Statistics",
    "Step",
    "UnitNorm",
    "check_finite_rows",
    "fit_in_memory",
    "parse_steps",
]

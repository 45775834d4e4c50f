"""The list of mutants, in the order of the stages: each fault would hurt a user who is told nothing."""

from __future__ import annotations

from benchmarks.mutants_back import BACKEND, CALIBRATION, EMIT, LOWER, MEASURE
from benchmarks.mutants_files import FILES
from benchmarks.mutants_front import CAPTURE, CHECK
from benchmarks.mutants_middle import COUPLE, SELECT, SHRINK
from benchmarks.mutants_nets import NETS

MUTANTS = (*CAPTURE, *CHECK, *COUPLE, *SELECT, *SHRINK, *LOWER, *NETS, *MEASURE, *EMIT, *BACKEND, *CALIBRATION, *FILES)

"""Calibration: masks and weights fitted to unlabelled data, so that a pruned model keeps its accuracy."""

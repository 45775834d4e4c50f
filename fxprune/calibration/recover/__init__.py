"""Training what calibration left to give what the dense model gives."""

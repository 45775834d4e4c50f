"""Results that train: ordinary modules of smaller parameters."""

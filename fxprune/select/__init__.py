"""The decision: scores and amounts become what stays of every weight and group."""

"""Which axes are the same axis: the groups that shrink together, and what is frozen and why."""

"""From the user's model to a program: what is accepted, what is captured, what a call must be like."""

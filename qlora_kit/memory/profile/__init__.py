"""The profile of a real run: every byte of the first steps, measured and compared with the plan."""

"""The account of bytes: planned before a run, followed during it."""

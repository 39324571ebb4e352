"""The tasks: what models are trained to do, a folder each."""

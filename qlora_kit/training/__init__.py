"""The training run, from settings to a finished run folder."""

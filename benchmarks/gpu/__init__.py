"""The phases of `on_gpu.py`: what each one runs, how they are run in time, and what they were to show."""

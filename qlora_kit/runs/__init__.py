"""Run folders: written, finished, opened again, and what is said of them."""

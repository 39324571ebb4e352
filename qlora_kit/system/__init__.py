"""The machine underneath: files, locks, host memory and the terminal."""

"""What the machine offers: files, locks, memory of the host, and the terminal."""

"""The frozen base: found, loaded, quantized, and what a task asks of it."""

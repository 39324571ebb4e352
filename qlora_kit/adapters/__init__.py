"""The LoRA factors: where they go, how they begin, and the files that they are kept in."""

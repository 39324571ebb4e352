"""Text generation: a model learns what to say next."""

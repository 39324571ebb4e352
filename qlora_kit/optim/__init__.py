"""What takes the step: optimizers, their paged states, and what is added to the gradient."""

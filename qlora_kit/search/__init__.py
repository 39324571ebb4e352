"""Settings chosen by cross-validation: a grid or Optuna's sampler, kept in SQLite, shared by several processes."""

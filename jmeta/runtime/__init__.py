"""Running it: training, checkpoints, configuration and reports."""

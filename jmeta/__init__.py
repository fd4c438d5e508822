"""jmeta: functional meta-learning for JAX."""

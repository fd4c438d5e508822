"""What a meta-gradient is. Imports jax and optax only."""

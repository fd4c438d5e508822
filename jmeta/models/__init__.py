"""Networks as pure functions on nested dicts of arrays, and adapters for module libraries."""

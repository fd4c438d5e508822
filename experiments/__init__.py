"""One runnable script per paper."""

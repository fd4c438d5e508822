"""What is learned from: episode samplers and the built-in tasks."""

"""Where examples come from: local files, the hub, tfds, and the loader that feeds them."""

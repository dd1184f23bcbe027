"""From films, pictures and conversations to the `Batch` the model reads. NumPy on the host, never JAX."""

"""From films, pictures and conversations to the `Batch` that the model reads. NumPy on the host; see README.md."""

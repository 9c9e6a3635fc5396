"""The user's model file: loading it, running its code, its microbatches."""

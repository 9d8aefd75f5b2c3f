"""Base model and adapter to text."""

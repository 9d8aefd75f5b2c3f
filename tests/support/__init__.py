"""Builders and measures that several tests use."""

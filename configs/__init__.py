"""The configuration of every program: YAML groups here, their defaults in dataclasses beside the code that uses them."""

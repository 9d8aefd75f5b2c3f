"""The configuration of every program: YAML groups here, defaults in dataclasses beside the code that uses them."""

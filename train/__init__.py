"""Mixtral with adapters, trained through DeepSpeed."""

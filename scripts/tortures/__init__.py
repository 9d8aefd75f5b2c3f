"""What `scripts/torture.py` does to training runs, a module each. All compare with a run that nothing happened to."""

"""Tests of train/report."""

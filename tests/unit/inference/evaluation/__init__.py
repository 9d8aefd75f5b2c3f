"""Tests of inference/evaluation."""

"""Measurements on the device at hand: what it sustains, and what a model's blocks take on it."""

"""Simulation: a plan's schedule in discrete events, on its topology, without running it."""

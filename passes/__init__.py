"""Pure functions from Program to Program; PIPELINE is their order."""

"""From a placed Program to readable stage modules."""

"""From a PlacementProblem to a Placement, with its proof."""

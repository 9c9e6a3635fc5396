"""The PipeDream-2BW runtime: one process per (stage, replica). Needs torch and safetensors alone."""

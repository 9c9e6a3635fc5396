"""The PipeDream-2BW runtime: one process per (stage, replica); torch and safetensors alone."""

"""What compiler, runtime and tools agree on: plan, stages, schedules, files of tensors, errors."""

"""What a step and a run need: optimizer step, checkpoints, folder, logs, validation."""

"""Programs that one reads from top to bottom: what the commands run."""

"""Everything between a checkpoint folder and a policy: upstream's format in and out."""

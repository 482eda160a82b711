"""Everything below the TensorDict: MuJoCo, the controller, the scenes and their pictures."""

"""A scripted expert that solves LIBERO's tasks: goals, skills, grasps and motions."""

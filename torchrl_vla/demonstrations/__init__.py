"""Making demonstrations: a scripted expert, and the processes that record it."""

"""Why it works: teachers and students by more than accuracy."""

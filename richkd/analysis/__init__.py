"""Analysis of teachers, students and results."""

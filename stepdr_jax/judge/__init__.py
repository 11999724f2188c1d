"""Rubric judges: verdicts, what they add up to, and who gives them."""

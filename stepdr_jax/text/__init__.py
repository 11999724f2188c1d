"""Pure functions on strings: matching, repetition, citations, scripts and languages."""

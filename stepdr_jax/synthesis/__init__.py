"""Training data made from documents and a knowledge graph: tasks, rubrics, expert episodes, reading, and their cleaning."""

"""Training data from documents and a knowledge graph: tasks, rubrics, episodes, synthetic documents, cleaning."""

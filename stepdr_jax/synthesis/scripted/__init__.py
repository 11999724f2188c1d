"""The offline expert and its domain: facts of countries, sentences that state them, tasks, episodes and documents."""

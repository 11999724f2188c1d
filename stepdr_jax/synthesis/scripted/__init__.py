"""The offline expert and its domain: facts of countries, the sentences that state them, tasks, episodes and documents."""
